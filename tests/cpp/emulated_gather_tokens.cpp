// The CUDA kernels as C++: cuda_emulation/ comes first on the include path.
#include "cuda/gather_tokens.cu"
