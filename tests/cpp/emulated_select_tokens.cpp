#include "cuda/select_tokens.cu"
