// libcuda, libcudart and libcublasLt in one: what unmodified cpm_kernels 1.0.11 binds and calls, with this CPU as GPU.
// A module has to be a real cubin that holds the symbol asked for; what runs is the same source, compiled by g++.
//
// EMULATED_DEVICES    how many GPUs there are (1)
// EMULATED_SEED       order of threads between barriers
// EMULATED_LOAD_ERROR the error that cuModuleLoadData answers, e.g. 209: no kernel image for this device
// EMULATED_LAUNCH     "skip": launches do nothing, which leaves the cost of the host
#include "device.h"

#include <mutex>
#include <string>

namespace {
#include "kernels.inc"

struct Kernel {
    const char *name;
    void (*run)(dim3 grid, dim3 shape, void **arguments);
};
#define KERNEL(name) \
    {#name, [](dim3 grid, dim3 shape, void **arguments) { \
        emulated::Launch<decltype(&name)>::run(&name, grid, shape, arguments); }},
const Kernel kernels[] = {
#include "names.inc"
};

enum Status { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

struct Module {
    std::string image;
    int device;
};
struct Function {
    const Kernel *kernel;
    int device;
};

thread_local int currentDevice = 0;
thread_local bool hasContext = false;  // as in a new thread, until it calls the runtime
char contexts[64];  // of the devices: their addresses
std::mutex oneLaunchAtATime;
struct { int count, device; void *stream; const char *kernel; int devicesSet; } launches;

int environment(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

size_t elfSize(const unsigned char *image) {  // up to the end of the section headers
    uint64_t headers;
    uint16_t size, count;
    memcpy(&headers, image + 40, sizeof headers);
    memcpy(&size, image + 58, sizeof size);
    memcpy(&count, image + 60, sizeof count);
    return headers + uint64_t(size) * count;
}

bool isLegal(dim3 grid, dim3 shape) {
    const bool gridFits = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16;
    const unsigned threads = shape.x * shape.y * shape.z;
    return gridFits && threads && threads <= 1024;
}
}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// ---- the driver -------------------------------------------------------------------------------------------------

API int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
API int cuGetErrorName(int, const char **text) { *text = "CUDA_ERROR"; return SUCCESS; }
API int cuGetErrorString(int error, const char **text) {
    switch (error) {
        case INVALID_VALUE: *text = "invalid argument"; break;
        case INVALID_IMAGE: *text = "device kernel image is invalid"; break;
        case INVALID_CONTEXT: *text = "invalid device context"; break;
        case INVALID_HANDLE: *text = "invalid resource handle"; break;
        case NOT_FOUND: *text = "named symbol not found"; break;
        default: *text = "no kernel image is available for execution on the device";
    }
    return SUCCESS;
}
API int cuCtxGetCurrent(void **context) {
    *context = hasContext ? &contexts[currentDevice] : nullptr;
    return SUCCESS;
}

API int cuModuleLoadData(void **module, const void *image) {
    if (int error = environment("EMULATED_LOAD_ERROR", 0)) return error;
    if (memcmp(image, "\177ELF", 4)) return INVALID_IMAGE;
    const auto bytes = static_cast<const unsigned char *>(image);
    *module = new Module{std::string(reinterpret_cast<const char *>(bytes), elfSize(bytes)), currentDevice};
    return SUCCESS;
}
API int cuModuleUnload(void *module) { delete static_cast<Module *>(module); return SUCCESS; }

API int cuModuleGetFunction(void **function, void *handle, const char *name) {
    const Module &module = *static_cast<Module *>(handle);
    const std::string symbol = std::string(1, '\0') + name + std::string(1, '\0');
    if (module.image.find(symbol) == std::string::npos) return NOT_FOUND;
    for (const Kernel &kernel : kernels)
        if (!strcmp(kernel.name, name)) {
            *function = new Function{&kernel, module.device};
            return SUCCESS;
        }
    return NOT_FOUND;
}

API int cuLaunchKernel(void *handle, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned threadsX,
                       unsigned threadsY, unsigned threadsZ, unsigned, void *stream, void **arguments, void **) {
    const auto function = static_cast<Function *>(handle);
    const dim3 grid{gridX, gridY, gridZ}, shape{threadsX, threadsY, threadsZ};
    if (!hasContext) return INVALID_CONTEXT;
    if (!function || function->device != currentDevice) return INVALID_HANDLE;
    if (!isLegal(grid, shape)) return INVALID_VALUE;
    const char *mode = getenv("EMULATED_LAUNCH");
    std::lock_guard<std::mutex> lock(oneLaunchAtATime);
    launches = {launches.count + 1, currentDevice, stream, function->kernel->name, launches.devicesSet};
    if (!mode || strcmp(mode, "skip")) function->kernel->run(grid, shape, arguments);
    return SUCCESS;
}

// ---- the runtime ------------------------------------------------------------------------------------------------

API int cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
API int cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
API int cudaGetDeviceCount(int *count) { *count = environment("EMULATED_DEVICES", 1); return SUCCESS; }
API int cudaGetDevice(int *device) { *device = currentDevice; return SUCCESS; }
API int cudaSetDevice(int device) {
    ++launches.devicesSet;
    currentDevice = device;
    hasContext = true;
    return SUCCESS;
}
API int cudaDeviceGetAttribute(int *value, int, int) { *value = 0; return SUCCESS; }
API int cudaFree(void *) { hasContext = true; return SUCCESS; }
API int cudaGetLastError() { return SUCCESS; }
API const char *cudaGetErrorString(int) { return "error of the emulated runtime"; }

// ---- cublasLt ---------------------------------------------------------------------------------------------------

API int cublasLtCreate(void **handle) { *handle = &launches; return SUCCESS; }
API size_t cublasLtGetVersion() { return 130000; }

// ---- for the tests ----------------------------------------------------------------------------------------------

API int emulatedLaunchCount() { return launches.count; }
API int emulatedLastDevice() { return launches.device; }
API void *emulatedLastStream() { return launches.stream; }
API const char *emulatedLastKernel() { return launches.kernel; }
API int emulatedDevicesSet() { return launches.devicesSet; }
