// Runs AMX instructions on a CPU without AMX: SIGILL, decode, execute on tile_unit(), go on.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "tile_implementations.h"
#include "tile_unit.h"

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>
#endif

namespace kvselect::test {
namespace {

[[maybe_unused]] bool runs_here(const char* wanted) {
    for (const std::string& name : cpu::available_implementations())
        if (name == wanted) return true;
    return false;
}

#if defined(__x86_64__) && defined(__linux__)

// A VEX instruction of the maps and forms that AMX uses (Intel SDM volume 2, chapter 2).
struct Instruction {
    bool is_tile = false;
    int prefix = 0;  // 0: none, 1: 66, 2: F3, 3: F2
    int opcode = 0;
    int reg = 0, rm = 0, vvvv = 0;  // tile numbers, unless there is memory
    bool memory = false, sib = false;
    uint64_t base = 0;   // address of the memory operand, without the index
    int64_t index = 0;   // scaled
    int64_t length = 0;  // bytes of the instruction
};

Instruction decode(const uint8_t* code, const gregset_t& registers) {
    constexpr int kRegister[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                   REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                   REG_R12, REG_R13, REG_R14, REG_R15};
    const auto value = [&](int number) {
        return static_cast<uint64_t>(registers[kRegister[number]]);
    };
    Instruction out;
    const bool map_0f38 = code[0] == 0xc4 && (code[1] & 31) == 2;
    const bool w0_l0 = (code[2] & 0x84) == 0;
    if (!map_0f38 || !w0_l0) return out;
    const int r = code[1] & 0x80 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    out.prefix = code[2] & 3;
    out.vvvv = ~(code[2] >> 3) & 15;
    out.opcode = code[3];
    out.is_tile =
        out.opcode == 0x49 || out.opcode == 0x4b || out.opcode == 0x5c || out.opcode == 0x5e;
    const uint8_t modrm = code[4];
    const int mod = modrm >> 6;
    out.reg = (modrm >> 3 & 7) | r;
    out.rm = (modrm & 7) | b;
    out.memory = mod != 3;
    const uint8_t* rest = code + 5;
    if (out.memory) {
        int base = out.rm;
        bool no_base = mod == 0 && (modrm & 7) == 5;  // RIP-relative
        if ((modrm & 7) == 4) {
            out.sib = true;
            const uint8_t sib = *rest++;
            const int index = (sib >> 3 & 7) | x;
            base = (sib & 7) | b;
            no_base = mod == 0 && (sib & 7) == 5;  // absolute
            if (index != 4) out.index = static_cast<int64_t>(value(index) << (sib >> 6));
        }
        const bool rip_relative = no_base && (modrm & 7) == 5;
        int64_t displacement = 0;
        if (mod == 1) displacement = static_cast<int8_t>(*rest++);
        if (mod == 2 || no_base) {
            int32_t wide;
            std::memcpy(&wide, rest, 4);
            displacement = wide, rest += 4;
        }
        const uint64_t after = reinterpret_cast<uint64_t>(rest);  // no immediates in these
        out.base = (rip_relative ? after
                    : no_base    ? 0
                                 : value(base)) +
                   static_cast<uint64_t>(displacement);
    }
    out.length = rest - code;
    return out;
}

// False for an instruction that is not one of ours; a fault of the unit throws.
bool execute(const Instruction& i) {
    TileUnit& unit = tile_unit();
    void* memory = reinterpret_cast<void*>(i.base);
    if (i.opcode == 0x49 && i.prefix == 0 && i.memory) {  // the index belongs to the address here
        unit.configure(static_cast<uint8_t*>(memory) + i.index);
    } else if (i.opcode == 0x49 && i.prefix == 0 && i.reg == 0 && i.rm == 0) {
        unit.release();
    } else if (i.opcode == 0x49 && i.prefix == 3 && !i.memory) {
        unit.zero(i.reg);
    } else if (i.opcode == 0x4b && i.prefix == 3 && i.sib) {
        unit.load(i.reg, memory, i.index);
    } else if (i.opcode == 0x4b && i.prefix == 2 && i.sib) {
        unit.store(i.reg, memory, i.index);
    } else if (i.opcode == 0x5e && i.prefix == 2 && !i.memory) {
        unit.dot_signed_unsigned(i.reg, i.rm, i.vvvv);
    } else if (i.opcode == 0x5c && i.prefix == 2 && !i.memory) {
        unit.dot_bfloat16(i.reg, i.rm, i.vvvv);
    } else {
        return false;
    }
    return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
    gregset_t& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    try {
        const Instruction instruction = decode(code, registers);
        if (instruction.is_tile && execute(instruction)) {
            registers[REG_RIP] += instruction.length;
            return;
        }
    } catch (const std::exception& fault) {
        std::fprintf(stderr, "tile fault at %p: %s\n", static_cast<const void*>(code),
                     fault.what());
        std::abort();
    }
    signal(SIGILL, SIG_DFL);  // not ours: it happens again, and ends the program
}

#endif

}  // namespace

const cpu::Implementation* amx_implementation_to_test() {
#if defined(__x86_64__)
    if (runs_here("amx")) return &cpu::amx_implementation();
#if defined(__linux__)
    if (runs_here("avx512_bf16")) {
        struct sigaction action = {};
        action.sa_sigaction = on_illegal_instruction;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGILL, &action, nullptr);
        return &cpu::amx_implementation();
    }
#endif
#endif
    return nullptr;
}

}  // namespace kvselect::test
