#include "bindings/huge_pages.h"
#include "bindings/ops.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

}  // namespace

// One `name=value` a line; kvselect/ops.py makes a dict of it. The KVSELECT_* texts come from
// CMakeLists.txt.
std::string build_info() {
    std::ostringstream text;
    text << "version=" << KVSELECT_VERSION << "\n"
         << "compiler=" << kCompiler << "\n"
         << "cpp_standard=" << __cplusplus << "\n"
         << "build_type=" << KVSELECT_BUILD_TYPE << "\n"
         << "target_processor=" << KVSELECT_PROCESSOR << "\n"
         << "torch_headers=" << KVSELECT_TORCH_HEADERS << "\n"
         << "torch_abi_target=" << (TORCH_TARGET_VERSION >> 56) << "."
         << ((TORCH_TARGET_VERSION >> 48) & 0xff) << "\n"
         << "cuda_archs=" << KVSELECT_CUDA_ARCHS << "\n";
    text << "cpu_compiled=";
    const char* separator = "";
    for (const cpu::Implementation* compiled : cpu::compiled_implementations()) {
        text << separator << compiled->name;
        separator = ",";
    }
    text << "\n";
    for (const cpu::Implementation* compiled : cpu::compiled_implementations())
        if (compiled->note) text << "cpu_note_" << compiled->name << "=" << compiled->note << "\n";
    return text.str();
}

std::string cpu_implementations() {
    std::string names;
    for (const std::string& name : cpu::available_implementations()) {
        names += (names.empty() ? "" : ",") + name;
    }
    return names;
}

std::string cpu_implementation() { return cpu::current_implementation().name; }

void set_cpu_implementation(StringArg name) { cpu::force_implementation(take_string(name)); }

void advise_huge_pages_at(int64_t address, int64_t num_bytes) {
    advise_huge_pages(reinterpret_cast<void*>(address), num_bytes);
}

}  // namespace kvselect::bindings
