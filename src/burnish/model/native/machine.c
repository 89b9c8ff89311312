/* What the process has to ask for before its first product. */

#include "bf16.h"

#ifdef BURNISH_AMX
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* Linux: Documentation/arch/x86/xstate.rst */
#endif

/* 0 if products can be computed here. */
int burnish_prepare(void) {
#ifdef BURNISH_AMX
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0;
#else
    return 0;
#endif
}
