// Keeps the library loadable on manylinux_2_28 (glibc 2.28). glibc 2.34 moved libpthread, libdl and
// librt into libc and gave their functions a new symbol version; the CUDA runtime that is linked in
// calls many. The linker turns each into __wrap_<name> (-Wl,--wrap in cmake/cuda.cmake, which reads
// the names here), and that jumps to the function by its old version, which every glibc has.
#if defined(__x86_64__)
#define OLD_AT(name, version)                                                         \
  asm(".text\n.hidden __wrap_" #name "\n.globl __wrap_" #name "\n.type __wrap_" #name \
      ", @function\n"                                                                 \
      ".symver old_" #name ", " #name "@" version "\n__wrap_" #name ": jmp old_" #name "@PLT\n");
#define OLD(name) OLD_AT(name, "GLIBC_2.2.5")
// clang-format off
OLD(dlclose) OLD(dlerror) OLD(dlopen) OLD(dlsym) OLD(dlvsym) OLD(pthread_condattr_setpshared)
OLD(pthread_create) OLD(pthread_detach) OLD(pthread_getspecific) OLD(pthread_join)
OLD(pthread_key_create) OLD(pthread_key_delete) OLD(pthread_kill) OLD(pthread_mutex_trylock)
OLD(pthread_mutexattr_destroy) OLD(pthread_mutexattr_init) OLD(pthread_mutexattr_setpshared)
OLD(pthread_mutexattr_settype) OLD(pthread_once) OLD(pthread_rwlock_destroy)
OLD(pthread_rwlock_init) OLD(pthread_rwlock_rdlock) OLD(pthread_rwlock_timedrdlock)
OLD(pthread_rwlock_timedwrlock) OLD(pthread_rwlock_tryrdlock) OLD(pthread_rwlock_trywrlock)
OLD(pthread_rwlock_unlock) OLD(pthread_rwlock_wrlock) OLD(pthread_rwlockattr_destroy)
OLD(pthread_rwlockattr_init) OLD(pthread_rwlockattr_setpshared) OLD(pthread_setspecific)
OLD(pthread_spin_destroy) OLD(pthread_spin_init) OLD(pthread_spin_lock) OLD(pthread_spin_trylock)
OLD(pthread_spin_unlock) OLD(sem_destroy) OLD(sem_init) OLD(sem_post) OLD(sem_timedwait)
OLD(sem_trywait) OLD(sem_wait) OLD(shm_open) OLD(shm_unlink)
OLD_AT(dlmopen, "GLIBC_2.3.4")
// clang-format on
#endif
