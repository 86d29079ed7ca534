#include "cuda/sm90a/block_sparse_attention.cu"
