# Read by llama.cpp's own CMakeLists right after its project() line (see install.py).

# llama-cpp-python forces the "common" helper library on; edgelora uses libllama and ggml alone, and this halves what has
# to be compiled.
set(LLAMA_BUILD_COMMON OFF)

# llama.cpp compiles ggml-base for any CPU of its kind, and only ggml-cpu for this one. The kernels that training calls
# (dequantize_row_*) stand in ggml-base: for this machine they are 1.3 to 3 times faster (Q4_0 2.0, Q5_0 3.1, Q8_0 1.6,
# Q4_K 1.5; AVX-512 against SSE2). Products and sums stay apart, so that every bit is that of gguf-py.
function(edgelora_compile_ggml_base_for_this_machine)
    if(NOT TARGET ggml-base OR NOT CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    target_compile_options(ggml-base PRIVATE -ffp-contract=off)
    if(GGML_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        target_compile_options(ggml-base PRIVATE -march=native)
    endif()
endfunction()
cmake_language(DEFER CALL edgelora_compile_ggml_base_for_this_machine)
