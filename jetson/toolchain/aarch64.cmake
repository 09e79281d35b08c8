# Cross-compiles llama.cpp on x86-64 Linux for Jetson Orin: Cortex-A78AE cores, Ampere GPU (sm_87).
#
# `remoe-edge build --target jetson` uses it. By hand:
#   cmake -S llama.cpp -B out -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake -DGGML_NATIVE=OFF \
#         [-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=87-real -DREMOE_CUDA_TOOLKIT=/path/from/cuda_toolkit.py]

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

# What every Orin has. -mcpu would clash with the -march that ggml sets for its own kernels.
set(_remoe_cpu "-march=armv8.2-a+dotprod+fp16 -mtune=cortex-a78ae")
set(CMAKE_C_FLAGS_INIT "${_remoe_cpu}")
set(CMAKE_CXX_FLAGS_INIT "${_remoe_cpu}")

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

# CMake checks compilers in projects of their own, which know no other variables than these.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES REMOE_CUDA_TOOLKIT)
if(REMOE_CUDA_TOOLKIT)
    set(CMAKE_CUDA_COMPILER ${REMOE_CUDA_TOOLKIT}/bin/nvcc)
    set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
    set(CUDAToolkit_ROOT ${REMOE_CUDA_TOOLKIT})
    list(APPEND CMAKE_FIND_ROOT_PATH ${REMOE_CUDA_TOOLKIT})
    # libggml-cuda needs these when a program is linked; on the device they come from JetPack. Not among the linker flags,
    # which projects and command lines set anew.
    foreach(_remoe_folder lib lib/stubs targets/aarch64-linux/lib targets/aarch64-linux/lib/stubs)
        if(IS_DIRECTORY ${REMOE_CUDA_TOOLKIT}/${_remoe_folder})
            string(APPEND CMAKE_CXX_STANDARD_LIBRARIES " -Wl,-rpath-link,${REMOE_CUDA_TOOLKIT}/${_remoe_folder}")
        endif()
    endforeach()
endif()
