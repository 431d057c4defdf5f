// OpenMP's functions, or those of the only thread where the library is compiled without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif
