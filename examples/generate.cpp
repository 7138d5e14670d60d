// Streams text from an `owl` deployment with onnxruntime-genai's C API and nothing of owl but the deployment.
// With the libraries of `pip install onnxruntime-genai` (SITE is the environment's site-packages):
//   g++ -std=c++17 examples/generate.cpp -o generate SITE/onnxruntime_genai/libonnxruntime-genai.so -Wl,-rpath,SITE/onnxruntime_genai
//   ln -s SITE/onnxruntime/capi/libonnxruntime.so.1.* libonnxruntime.so   # genai opens it by this name
//   LD_LIBRARY_PATH=. ./generate DEPLOYMENT "The capital of France is" [THREADS]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

// The wheel has no header; with the release archive's, `#include "ort_genai_c.h"` replaces these lines.
extern "C" {
struct OgaResult; struct OgaConfig; struct OgaModel; struct OgaTokenizer; struct OgaTokenizerStream;
struct OgaSequences; struct OgaGeneratorParams; struct OgaGenerator;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateConfig(const char* folder, OgaConfig**);
OgaResult* OgaConfigOverlay(OgaConfig*, const char* json);
OgaResult* OgaCreateModelFromConfig(const OgaConfig*, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaUpdateTokenizerOptions(OgaTokenizer*, const char* const* names, const char* const* values, std::size_t);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, std::int32_t token, const char** text);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
std::size_t OgaSequencesGetSequenceCount(const OgaSequences*, std::size_t sequence);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double value);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const std::int32_t** tokens, std::size_t* count);
void OgaDestroyGenerator(OgaGenerator*); void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroySequences(OgaSequences*); void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroyTokenizer(OgaTokenizer*); void OgaDestroyConfig(OgaConfig*); void OgaDestroyModel(OgaModel*); void OgaShutdown();
}

static void check(OgaResult* result) {
  if (result == nullptr) return;
  std::fprintf(stderr, "%s\n", OgaResultGetError(result));
  std::exit(1);
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) return std::fprintf(stderr, "usage: %s DEPLOYMENT PROMPT [THREADS]\n", argv[0]), 2;
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // else its builds report to Microsoft
  // Without a number ONNX Runtime takes one thread on some virtual machines of two cores. The physical cores
  // are best: half of hardware_concurrency() where each runs two threads.
  std::string threads = argc == 4 ? argv[3] : std::to_string(std::thread::hardware_concurrency());
  std::string overlay =
      R"({"model": {"decoder": {"session_options": {"intra_op_num_threads": )" + threads + "}}}}";
  OgaConfig* config; OgaModel* model; OgaTokenizer* tokenizer; OgaTokenizerStream* stream;
  OgaSequences* prompt; OgaGeneratorParams* parameters; OgaGenerator* generator;
  check(OgaCreateConfig(argv[1], &config));
  check(OgaConfigOverlay(config, overlay.c_str()));
  check(OgaCreateModelFromConfig(config, &model));
  check(OgaCreateTokenizer(model, &tokenizer));
  // The tokens that the model's own tokenizer puts before a text: a BOS, mostly.
  const char* name = "add_special_tokens"; const char* value = "true";
  check(OgaUpdateTokenizerOptions(tokenizer, &name, &value, 1));
  check(OgaCreateTokenizerStream(tokenizer, &stream));
  check(OgaCreateSequences(&prompt));
  check(OgaTokenizerEncode(tokenizer, argv[2], prompt));
  check(OgaCreateGeneratorParams(model, &parameters));
  const std::size_t length = OgaSequencesGetSequenceCount(prompt, 0) + 64;
  check(OgaGeneratorParamsSetSearchNumber(parameters, "max_length", static_cast<double>(length)));
  check(OgaCreateGenerator(model, parameters, &generator));
  check(OgaGenerator_AppendTokenSequences(generator, prompt));
  std::printf("%s", argv[2]);
  while (!OgaGenerator_IsDone(generator)) {
    const std::int32_t* tokens; std::size_t count; const char* text;
    check(OgaGenerator_GenerateNextToken(generator));
    check(OgaGenerator_GetNextTokens(generator, &tokens, &count));
    check(OgaTokenizerStreamDecode(stream, tokens[0], &text));
    std::printf("%s", text);
    std::fflush(stdout);
  }
  std::printf("\n");
  OgaDestroyGenerator(generator); OgaDestroyGeneratorParams(parameters); OgaDestroySequences(prompt);
  OgaDestroyTokenizerStream(stream); OgaDestroyTokenizer(tokenizer); OgaDestroyModel(model); OgaDestroyConfig(config);
  OgaShutdown();
}
