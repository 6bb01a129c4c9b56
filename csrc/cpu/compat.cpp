// Keeps the library loadable on manylinux_2_28 (glibc 2.28, the libstdc++ of GCC 8) when it is
// built with a newer compiler: what the torch headers would otherwise ask of a newer libstdc++ is
// instantiated here, inside the library. tests/test_wheel.py checks the result.
#include <new>
#include <sstream>

// shared_ptr reads this flag of glibc 2.32 to skip atomics while there is one thread. Ours says
// that there are always several, which is true of a torch process.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Constructors and str() && of the string streams got new symbol versions in GCC 9 and 12.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Thrown by operator new[] and containers asked for an impossible size; a function of its own since
// GCC 11.
namespace std {
void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
