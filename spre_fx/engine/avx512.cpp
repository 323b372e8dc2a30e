// The engine for CPUs with AVX-512 (F, BW, VL and DQ).
#include "vector_avx512.h"
//
#include "run.h"
