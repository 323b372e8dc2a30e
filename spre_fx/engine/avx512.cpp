// The engine for CPUs with AVX-512 (F, BW, VL and DQ).
#include "vector_avx512.h"
// Every other header is written in the vectors above.
#include "run.h"
#include "run_training.h"
