// The engine for CPUs with AVX2 and FMA.
#include "vector_avx2.h"
//
#include "run.h"
