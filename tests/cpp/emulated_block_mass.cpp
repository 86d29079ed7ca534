#include "cuda/block_mass.cu"
