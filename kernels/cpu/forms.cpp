// Which forms this processor can run, asked once.
#include "forms.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(EV_EMULATE_AVX512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux hands out the tiles' registers on request, once for all threads of a process.
static bool amx() {
  enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#elif defined(EV_EMULATE_AVX512)
static bool amx() { return true; }
#else
static bool amx() { return false; }
#endif

static bool runs(int32_t kernel) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(EV_EMULATE_AVX512)
  const bool avx512 = avx2, bf16 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  switch (kernel) {
    case EV_CPU_SCALAR: return true;
    case EV_CPU_AVX2: return avx2;
    case EV_CPU_AVX512: return avx512;
    case EV_CPU_AVX512_BF16: return bf16;
    case EV_CPU_AMX: return bf16 && amx();
    default: return false;
  }
#else
  return kernel == EV_CPU_SCALAR;
#endif
}

extern "C" const ev_cpu_form* ev_cpu_form_for(int32_t kernel) {
  static const bool able[] = {false, runs(EV_CPU_SCALAR), runs(EV_CPU_AVX2), runs(EV_CPU_AVX512), runs(EV_CPU_AVX512_BF16), runs(EV_CPU_AMX)};
  if (kernel < EV_CPU_SCALAR || kernel > EV_CPU_AMX || !able[kernel]) return nullptr;
#if defined(__x86_64__)
  switch (kernel) {
    case EV_CPU_AMX: return &ev_form_amx;
    case EV_CPU_AVX512_BF16: return &ev_form_avx512_bf16;
    case EV_CPU_AVX512: return &ev_form_avx512;
    case EV_CPU_AVX2: return &ev_form_avx2;
  }
#endif
  return &ev_form_scalar;
}

extern "C" int32_t ev_cpu_fastest(void) {
  int32_t kernel = EV_CPU_AMX;
  while (kernel > EV_CPU_SCALAR && !ev_cpu_form_for(kernel)) --kernel;
  return kernel;
}
