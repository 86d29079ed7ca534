// The sketch on a tile unit: the integer products against plain loops, and whole scores against the
// implementation that differs in nothing else, bit for bit.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "check.h"
#include "cpu/target_region.h"
#include "inputs.h"
#include "kvselect/score_tokens.h"
#include "sketch_codec.h"
#include "tile_implementations.h"
#include "tile_unit.h"

using namespace kvselect;
using namespace kvselect::test;

namespace kvselect::cpu {
namespace {

#include "tiles_emulated.h"
#include "cpu/tile_dot-inl.h"

}  // namespace
}  // namespace kvselect::cpu

namespace {

// Rows of A in a block of exactly their size, with a stride of their own.
struct Rows {
    Rows(Random& random, int64_t count, int64_t head_dim)
        : stride(head_dim + random.below(40)),
          bytes(count == 0 ? 0 : static_cast<size_t>((count - 1) * stride + head_dim)) {
        for (int8_t& x : bytes) x = static_cast<int8_t>(random.bits());
    }
    cpu::TileGroup group(int64_t count) const { return {bytes.data(), stride, count}; }
    int64_t stride;
    std::vector<int8_t> bytes;
};

void multiply_and_compare(Random& random, SketchFormat format, int64_t head_dim, int64_t rows0,
                          int64_t rows1) {
    std::vector<uint8_t> codes(static_cast<size_t>(sketch_code_bytes(format, head_dim)));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.bits());
    std::vector<uint8_t> lines = codes;
    if (format == SketchFormat::kInt4) {
        lines.assign(2 * codes.size(), 0xab);
        cpu::unpack_nibbles(codes.data(), head_dim, lines.data());
    }
    const Rows first(random, rows0, head_dim), second(random, rows1, head_dim);
    constexpr int32_t kUntouched = -12345;
    auto out = std::make_unique<int32_t[][kSketchBlockTokens]>(2 * cpu::kTileRows);
    std::fill(out[0], out[0] + 2 * cpu::kTileRows * kSketchBlockTokens, kUntouched);
    {
        cpu::TileScope tiles(head_dim);
        EXPECT(!tile_unit().configured());
        cpu::tile_dot_block(tiles, lines.data(), head_dim, first.group(rows0), second.group(rows1),
                            out.get());
        EXPECT(tile_unit().configured());
    }
    EXPECT(!tile_unit().configured());

    // channel() reads a record: two float16 per channel, then the codes.
    std::vector<uint8_t> record(static_cast<size_t>(4 * head_dim));
    record.insert(record.end(), codes.begin(), codes.end());
    for (int64_t r = 0; r < 2 * cpu::kTileRows; ++r) {
        const bool is_second = r >= cpu::kTileRows;
        const Rows& rows = is_second ? second : first;
        const int64_t row = r % cpu::kTileRows;
        for (int64_t t = 0; t < kSketchBlockTokens; ++t) {
            int64_t want = 0;
            if (row >= (is_second ? rows1 : rows0)) {
                want = kUntouched;
            } else {
                for (int64_t d = 0; d < head_dim; ++d)
                    want += int64_t{rows.bytes[row * rows.stride + d]} *
                            channel(record.data(), head_dim, format, t, d).code;
            }
            EXPECT(out[r][t] == want, "head_dim ", head_dim, ", rows ", rows0, " + ", rows1,
                   ", row ", r, ", token ", t);
        }
    }
}

// Everything that score_tokens gives, as bits.
struct ScoredBits {
    std::vector<float> scores, lse;
    std::vector<int64_t> num_nonfinite;
    bool operator==(const ScoredBits& other) const {
        const auto same = [](const auto& a, const auto& b) {
            return a.size() == b.size() &&
                   std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
        };
        return same(scores, other.scores) && same(lse, other.lse) &&
               num_nonfinite == other.num_nonfinite;
    }
};

struct ScoreCase {
    SketchFormat format;
    int64_t head_dim, group, num_vectors;
};

ScoredBits score(const cpu::Implementation& ops, const ScoreCase& c, Cache& cache,
                 const SketchView& sketch, const std::vector<int32_t>& starts) {
    const int64_t batch = static_cast<int64_t>(cache.seqlens.size()),
                  num_q_heads = cache.num_kv_heads * c.group;
    const int64_t longest = *std::max_element(cache.seqlens.begin(), cache.seqlens.end());
    Random random(static_cast<uint64_t>(c.head_dim + c.group));
    std::vector<float> q(static_cast<size_t>(batch * c.num_vectors * num_q_heads * c.head_dim));
    for (float& x : q) x = static_cast<float>(random.normal());
    std::fill(q.begin(), q.begin() + c.head_dim, 0.f);  // a query of zeros has no unit of its own
    if (c.num_vectors > 1) q[q.size() / 2] = NAN;       // and a vector may be left out
    ScoreTokensParams p{};
    p.dtype = DType::kBFloat16;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = cache.num_kv_heads;
    p.head_dim = c.head_dim;
    p.blocks = QueryBlocks{
        batch, 1, 1, nullptr, cache.seqlens.data(), starts.data(), WindowRule::kDecode, 5, 40};
    p.num_vectors = c.num_vectors;
    p.q = q.data();
    p.keys = cache.keys();
    p.sketch = sketch;
    p.scale = 0.15f;
    ScoredBits out{std::vector<float>(static_cast<size_t>(batch * cache.num_kv_heads * longest)),
                   std::vector<float>(static_cast<size_t>(batch * c.num_vectors * num_q_heads)),
                   std::vector<int64_t>(static_cast<size_t>(batch * cache.num_kv_heads))};
    p.scores = out.scores.data();
    p.max_seqlen_k = longest;
    p.lse = out.lse.data();
    p.num_nonfinite = out.num_nonfinite.data();
    std::vector<float> workspace(static_cast<size_t>(score_tokens_workspace_floats(p)), NAN),
        scratch(static_cast<size_t>(score_tokens_scratch_floats(p)), NAN);
    for (int64_t item = 0; item < batch * cache.num_kv_heads; ++item)
        for (const ScoreStage stage : {ScoreStage::kWeigh, ScoreStage::kVote})
            ops.score_tokens(p, stage, item, 0, score_tokens_parts(p), workspace.data(),
                             scratch.data());
    return out;
}

// One below, at and above: the smallest number of columns on tiles, one group, two groups.
constexpr int64_t kColumns[][2] = {{7, 1}, {8, 1},  {4, 3},  {16, 1}, {17, 1},
                                   {8, 4}, {11, 3}, {16, 4}, {5, 13}};  // group, vectors

void same_bits(const cpu::Implementation& ops, const cpu::Implementation& twin) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t head_dim : kHeadDims) {
            Random random(static_cast<uint64_t>(head_dim));
            const std::vector<int32_t> starts{37, 0, 0};
            Cache cache(DType::kBFloat16, Layout::kPaged, {430, 127, 301}, 2, head_dim);
            cache.fill(random);
            cache.k.set(cache.keys().offset(0, 200, 0) + 3, kNaN);  // a block without codes
            Sketch sketch(cache, format, starts);
            for (const auto& [group, vectors] : kColumns) {
                const ScoreCase c{format, head_dim, group, vectors};
                const ScoredBits want = score(twin, c, cache, sketch.view, starts);
                EXPECT(score(ops, c, cache, sketch.view, starts) == want, ops.name, " is not ",
                       twin.name, " at head_dim ", head_dim, ", ", group, " x ", vectors,
                       " columns");
                EXPECT(want == want && std::isfinite(want.lse[0]));
            }
        }
}

const cpu::Implementation* available(const char* wanted) {
    const auto names = cpu::available_implementations();
    if (std::find(names.begin(), names.end(), wanted) == names.end()) return nullptr;
    for (const cpu::Implementation* one : cpu::compiled_implementations())
        if (std::string(one->name) == wanted) return one;
    return nullptr;
}

}  // namespace

TEST_ONCE(tile_steps_are_equal_and_fit) {
    for (int64_t head_dim = 16; head_dim <= 256; head_dim += 16) {
        const int64_t steps = cpu::tile_steps(head_dim), channels = head_dim / steps;
        EXPECT(steps * channels == head_dim && channels % 4 == 0 && channels <= 64, head_dim);
        EXPECT(steps <= 4, head_dim);
    }
}

TEST_ONCE(tile_dot_multiplies_like_plain_loops) {
    Random random(2);
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t head_dim = 16; head_dim <= 256; head_dim += 16) {
            multiply_and_compare(random, format, head_dim, 16, 16);
            multiply_and_compare(random, format, head_dim, 1, 0);
            multiply_and_compare(random, format, head_dim, 1 + random.below(16), random.below(17));
        }
}

TEST_ONCE(tile_dot_takes_the_largest_sums) {
    for (int8_t query : {int8_t{-128}, int8_t{127}}) {
        const std::vector<uint8_t> codes(
            static_cast<size_t>(sketch_code_bytes(SketchFormat::kInt8, 256)), 255);
        const std::vector<int8_t> rows(16 * 256, query);
        const cpu::TileGroup all{rows.data(), 256, 16};
        auto out = std::make_unique<int32_t[][kSketchBlockTokens]>(32);
        cpu::TileScope tiles(256);
        cpu::tile_dot_block(tiles, codes.data(), 256, all, all, out.get());
        for (int64_t r = 0; r < 32; ++r)
            for (int64_t t = 0; t < kSketchBlockTokens; ++t) EXPECT(out[r][t] == 256 * 255 * query);
    }
}

TEST_ONCE(tile_scope_configures_once_for_one_shape) {
    const std::vector<uint8_t> lines(static_cast<size_t>(kSketchBlockTokens * 64));
    const std::vector<int8_t> rows(16 * 64);
    auto out = std::make_unique<int32_t[][kSketchBlockTokens]>(32);
    cpu::TileScope tiles(64);
    const auto multiply = [&](int64_t rows0, int64_t rows1) {
        cpu::tile_dot_block(tiles, lines.data(), 64, {rows.data(), 64, rows0},
                            {rows.data(), 64, rows1}, out.get());
        return tile_unit().num_configurations();
    };
    const int64_t before = tile_unit().num_configurations();
    EXPECT(multiply(16, 16) == before + 1);
    EXPECT(multiply(16, 16) == before + 1);
    EXPECT(multiply(16, 3) == before + 2);
    EXPECT(multiply(16, 0) == before + 3);
    EXPECT(multiply(3, 0) == before + 4);
}

TEST_ONCE(scalar_with_tiles_scores_with_the_bits_of_scalar) {
    const int64_t before = tile_unit().num_dots();
    same_bits(scalar_tiles_implementation(), cpu::scalar_implementation());
    EXPECT(tile_unit().num_dots() > before);
    EXPECT(!tile_unit().configured());
}

TEST_ONCE(avx2_vnni_scores_with_the_bits_of_avx2) {
    if (const cpu::Implementation* vnni = available("avx2_vnni"))
        same_bits(*vnni, *available("avx2"));
}

TEST_ONCE(amx_scores_with_the_bits_of_avx512_bf16) {
    const cpu::Implementation* amx = amx_implementation_to_test();
    if (!amx) return;
    const bool emulated = available("amx") == nullptr;
    const int64_t before = tile_unit().num_dots();
    same_bits(*amx, *available("avx512_bf16"));
    EXPECT(!emulated || tile_unit().num_dots() > before);
    EXPECT(!tile_unit().configured());
}

// Tiles belong to a thread: several at once, and none keeps them.
TEST_ONCE(amx_scores_with_the_same_bits_on_other_threads) {
    const cpu::Implementation* amx = amx_implementation_to_test();
    if (!amx) return;
    Random random(5);
    const std::vector<int32_t> starts{0};
    Cache cache(DType::kBFloat16, Layout::kHeadMajor, {600}, 2, 128);
    cache.fill(random);
    Sketch sketch(cache, SketchFormat::kInt4, starts);
    const ScoreCase c{SketchFormat::kInt4, 128, 20, 1};
    const ScoredBits want = score(*amx, c, cache, sketch.view, starts);
    ScoredBits got[3];
    bool released[3] = {};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            got[i] = score(*amx, c, cache, sketch.view, starts);
            released[i] = !tile_unit().configured();
        });
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < 3; ++i) EXPECT(got[i] == want && released[i], i);
}
