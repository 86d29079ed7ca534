// What score_tokens may hand to select_tokens besides the scores (CUDA): how many candidates of a
// list have which top bits, and in which bin the border of the best lies.
#pragma once

#include <cstdint>

namespace kvselect {

constexpr int64_t kRankingWords = 8 + 4096;  // int32 per list, aligned to 8 bytes

}  // namespace kvselect
