#include "cuda/score_tokens.cu"
