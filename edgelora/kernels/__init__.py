"""edgelora's own C code: a step's inner loops on a CPU."""
