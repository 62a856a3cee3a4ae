# Read by llama.cpp's own CMakeLists right after its project() line (see install.py): llama-cpp-python forces the
# "common" helper library on; edgelora uses libllama and ggml alone, and this halves what has to be compiled.
set(LLAMA_BUILD_COMMON OFF)
