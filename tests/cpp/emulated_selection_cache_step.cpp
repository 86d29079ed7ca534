#include "cuda/selection_cache_step.cu"
