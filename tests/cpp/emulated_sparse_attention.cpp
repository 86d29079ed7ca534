#include "cuda/sparse_attention.cu"
