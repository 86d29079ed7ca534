// Which CPU implementations exist, which run here, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kvselect/block_mass.h"
#include "kvselect/block_sparse_attention.h"
#include "kvselect/gather_tokens.h"
#include "kvselect/kv_append.h"
#include "kvselect/list_blocks.h"
#include "kvselect/merge_splits.h"
#include "kvselect/recovered_mass.h"
#include "kvselect/rolling_sweep.h"
#include "kvselect/score_tokens.h"
#include "kvselect/select_tokens.h"
#include "kvselect/selection_cache_step.h"
#include "kvselect/sparse_attention.h"

namespace kvselect::cpu {

// One instruction set's compilation of every op.
struct Implementation {
    const char* name;
    const char* note;  // what its user should know; nullptr: nothing
    KvAppendFn kv_append;
    ScoreTokensFn score_tokens;
    SelectTokensFn select_tokens;
    SparseAttentionFn sparse_attention;
    MergeSplitsFn merge_splits;
    RecoveredMassFn recovered_mass;
    SelectionCacheStepFn selection_cache_step;
    RollingSweepFn rolling_sweep;
    BlockSparseAttentionFn block_sparse_attention;
    BlockMassFn block_mass;
    ListBlocksFn list_blocks;
    GatherTokensFn gather_tokens;
};

// Each isa_<isa>.cpp defines one of these; the x86 ones exist on x86-64 only.
const Implementation& scalar_implementation();
const Implementation& avx2_implementation();         // AVX2, FMA, F16C
const Implementation& avx2_vnni_implementation();    // the same + AVX-VNNI
const Implementation& avx512_implementation();       // F, BW, VL, DQ, VNNI
const Implementation& avx512_bf16_implementation();  // the same + BF16
const Implementation& amx_implementation();          // the same + AMX TILE, INT8

// All that are in this build, slowest first.
const std::vector<const Implementation*>& compiled_implementations();
// Names of all that this CPU can run, slowest first ("scalar" always).
std::vector<std::string> available_implementations();
// The one in use: the last available one, unless KVSELECT_CPU or force_implementation said
// otherwise.
const Implementation& current_implementation();
// Throws if `name` is unknown or this CPU lacks it; "auto" goes back to the best one.
void force_implementation(const std::string& name);

}  // namespace kvselect::cpu
