#include "cuda/kv_append.cu"
