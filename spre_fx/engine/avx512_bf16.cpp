// The engine for CPUs with AVX-512 that multiply bfloat16 too: all of avx512.cpp and that.
#define SPRE_HAS_BFLOAT16
#include "vector_avx512.h"
// Every other header is written in the vectors above.
#include "run.h"
#include "run_training.h"
