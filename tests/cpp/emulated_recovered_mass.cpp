#include "cuda/recovered_mass.cu"
