#include "cuda/block_sparse_attention.cu"
