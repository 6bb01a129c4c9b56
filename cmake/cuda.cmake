# _native_cuda.so: needs nvcc, no GPU and no CUDA build of torch.

# From TORCH_CUDA_ARCH_LIST ("8.0;9.0a 10.0+PTX") to CMake's words.
function(cuda_architectures_from_torch_list list result)
  string(REGEX REPLACE "[ ,]+" ";" entries "${list}")
  set(out)
  foreach(entry ${entries})
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9][a-z]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: ${entry} is not a compute capability such as 8.0, 9.0a or 10.0+PTX")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    list(APPEND out "${number}-real")
    if(CMAKE_MATCH_3)
      list(APPEND out "${number}-virtual")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES out)
  set(${result} ${out} PARENT_SCOPE)
endfunction()

if(DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  cuda_architectures_from_torch_list("$ENV{TORCH_CUDA_ARCH_LIST}" CUDA_ARCHITECTURES)
elseif(RECSPARSE_CUDA_ARCHITECTURES)
  set(CUDA_ARCHITECTURES ${RECSPARSE_CUDA_ARCHITECTURES})
else()
  set(CUDA_ARCHITECTURES 80-virtual 80-real 90a-real)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE KNOWN ERROR_QUIET)
  if(KNOWN MATCHES "sm_100")
    list(APPEND CUDA_ARCHITECTURES 100-real)
  endif()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMakes older than nvcc's C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
message(STATUS "recsparse_kernels: _native_cuda.so by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CUDA_ARCHITECTURES}")

# Files named *_sm90.cu use instructions of one architecture only (wgmma) and are compiled for it alone.
file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB CUDA_SM90_SOURCES CONFIGURE_DEPENDS csrc/cuda/*_sm90.cu)
if(CUDA_SM90_SOURCES)
  list(REMOVE_ITEM CUDA_SOURCES ${CUDA_SM90_SOURCES})
endif()
set(WITH_SM90 OFF)
if(CUDA_SM90_SOURCES AND "${CUDA_ARCHITECTURES}" MATCHES "90a")
  set(WITH_SM90 ON)
endif()

add_library(recsparse_cuda_options INTERFACE)
target_compile_definitions(recsparse_cuda_options INTERFACE USE_CUDA)
if(WITH_SM90)
  target_compile_definitions(recsparse_cuda_options INTERFACE RS_WITH_SM90)
endif()
target_compile_options(recsparse_cuda_options INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:--compress-mode=size --expt-relaxed-constexpr --expt-extended-lambda -Xcompiler=-Wno-unknown-pragmas,-Wno-unused-parameter>"
  # ptxas tells of spills, nvcc of kernels that are never used: figures are bench/cuda_resources.py's
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-diag-suppress=177>")

# torch's headers, without its warnings; -Wall -Wextra -Werror reach the host compiler through -Xcompiler.
add_library(recsparse_host_options INTERFACE)
get_target_property(RECSPARSE_INCLUDES recsparse_options INTERFACE_INCLUDE_DIRECTORIES)
get_target_property(RECSPARSE_SYSTEM_INCLUDES recsparse_options INTERFACE_SYSTEM_INCLUDE_DIRECTORIES)
target_include_directories(recsparse_host_options SYSTEM INTERFACE ${RECSPARSE_SYSTEM_INCLUDES})
get_target_property(RECSPARSE_DEFINITIONS recsparse_options INTERFACE_COMPILE_DEFINITIONS)
target_compile_definitions(recsparse_host_options INTERFACE ${RECSPARSE_DEFINITIONS})
target_compile_options(recsparse_host_options INTERFACE
  # GCC 12 takes an empty std::optional for one that holds a tensor
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcompiler=-Wall,-Wextra,-Wno-maybe-uninitialized,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=,-ffile-prefix-map=${TORCH_DIR}/=torch/>")
if(RECSPARSE_WERROR)
  target_compile_options(recsparse_host_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
endif()

# Where torch is a CPU build there is no libtorch_cuda.so to link with. Its name is all that the linker
# needs: the library is in the process before ours is loaded.
file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_name.cpp" "extern \"C\" int aoti_torch_get_current_cuda_stream() { return 0; }\n")
add_library(torch_cuda_name SHARED "${CMAKE_BINARY_DIR}/torch_cuda_name.cpp")
set_target_properties(torch_cuda_name PROPERTIES OUTPUT_NAME torch_cuda CXX_VISIBILITY_PRESET default
  LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/names")

function(add_cuda_objects name)
  add_library(${name} OBJECT ${ARGN})
  target_link_libraries(${name} PRIVATE recsparse_host_options recsparse_cuda_options)
endfunction()

add_cuda_objects(cuda_kernels ${CUDA_SOURCES})
set(CUDA_OBJECTS $<TARGET_OBJECTS:cuda_kernels>)
if(WITH_SM90)
  add_cuda_objects(cuda_kernels_sm90 ${CUDA_SM90_SOURCES})
  set_target_properties(cuda_kernels_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND CUDA_OBJECTS $<TARGET_OBJECTS:cuda_kernels_sm90>)
endif()

add_library(native_cuda MODULE csrc/cpu/compat.cpp csrc/cuda/compat.cpp ${CUDA_OBJECTS})
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  file(STRINGS csrc/cuda/compat.cpp COMPAT REGEX "^OLD")
  string(REGEX MATCHALL "OLD(_AT)?\\([a-z_]+" COMPAT "${COMPAT}")
  foreach(entry ${COMPAT})
    string(REGEX REPLACE "OLD(_AT)?\\(" "" function "${entry}")
    target_link_options(native_cuda PRIVATE "-Wl,--wrap=${function}")
  endforeach()
endif()
target_link_libraries(native_cuda PRIVATE recsparse_options "${TORCH_DIR}/lib/libtorch_cpu.so" torch_cuda_name)
target_link_options(native_cuda PRIVATE "-Wl,--version-script=${CMAKE_SOURCE_DIR}/csrc/exports.map"
  -Wl,-z,noexecstack -Wl,--gc-sections)
set_target_properties(native_cuda PROPERTIES
  OUTPUT_NAME _native_cuda PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${RECSPARSE_OUTPUT_DIR}"
  LINKER_LANGUAGE CUDA SKIP_BUILD_RPATH ON)
