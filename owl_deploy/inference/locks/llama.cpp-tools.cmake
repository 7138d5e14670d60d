# Takes the place of llama.cpp's own tools/CMakeLists.txt: of its tools, the server alone.
find_package(Threads REQUIRED)
llama_add_compile_flags()
add_subdirectory(mtmd)
add_subdirectory(ui)
add_subdirectory(server)
