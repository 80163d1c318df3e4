"""The key/value cache: one behaviour on every transformers version, and no copy of the past at each token.

transformers' DynamicCache concatenates, which copies the whole past for every new token. Here the keys and values of a
layer are views of a buffer with room for more, so that a new token is written in place; everything else (crop, beam
reordering, batching) stays the base class's, because it only ever sees the views. Versions below 4.36 have no cache
classes: a minimal stand-in serves there.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import threading
import weakref
import zipfile
from typing import Optional

import torch
import transformers
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import PreTrainedTokenizer
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

try:  # 4.25
    from transformers import GenerationMixin
except ImportError:
    from transformers.generation_utils import GenerationMixin

try:  # 4.36
    from transformers.cache_utils import DynamicCache
except ImportError:

    class DynamicCache:
        def __init__(self):
            self.key_cache: list[Tensor] = []
            self.value_cache: list[Tensor] = []

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.key_cache[layer_idx].shape[-2] if len(self.key_cache) > layer_idx else 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for states in (self.key_cache, self.value_cache):
                states[:] = [
                    state if state is None else state.index_select(0, beam_idx.to(state.device)) for state in states
                ]


try:  # 4.54
    from transformers.cache_utils import DynamicLayer
except ImportError:
    DynamicLayer = None

# What generate calls the cache, in its arguments and in outputs: "past_key_values" before 5.24, "cache" since then.
CACHE_NAME = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
logger = logging.get_logger(__name__)
CHUNK = 256  # tokens of room that a full buffer grows by: 112 MiB for the 6B model in 16 bit


class GrowingStates:
    """The keys, or the values, of one layer: a view [B, H, used, D] of a buffer [B, H, used + room, D]."""

    def __init__(self):
        self.buffer: Optional[Tensor] = None
        self.used = 0  # tokens of the buffer that were handed out: who kept them keeps their numbers

    def append(self, past: Optional[Tensor], new: Tensor) -> Tensor:
        """past [B, H, n, D] or None, new [B, H, s, D] -> [B, H, n + s, D]; `past` is what the last call returned, or
        any other tensor (cropped, reordered, loaded), which is then copied into a new buffer once."""
        used = 0 if past is None else past.shape[-2]
        if torch.is_grad_enabled() and (new.requires_grad or (used and past.requires_grad)):
            return new if not used else torch.cat((past, new), dim=-2)  # autograd keeps the past: don't write into it
        states = self.reserve(past, new)
        states[:, :, used:] = new
        return states

    def reserve(self, past: Optional[Tensor], new: Tensor) -> Tensor:
        """As `append`, but the numbers of `new` are not read: who asked writes them."""
        used = 0 if past is None else past.shape[-2]
        total = used + new.shape[-2]
        if not (used and self._holds(past, new)) or total > self.buffer.shape[-2]:
            batch, heads, _, size = new.shape
            self.buffer = new.new_empty(batch, heads, total + CHUNK - total % CHUNK, size)
            if used:
                self.buffer[:, :, :used] = past
        self.used = total
        return self.buffer[:, :, :total]

    def _holds(self, past: Tensor, new: Tensor) -> bool:
        """Whether `past` is the front of the buffer, and `new` can be written behind it."""
        buffer = self.buffer
        if buffer is None or past.shape[-2] != self.used:
            return False
        if any((t.dtype, t.device) != (buffer.dtype, buffer.device) for t in (past, new)):
            return False
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return (
            past.data_ptr() == buffer.data_ptr()
            and past.shape[:2] == buffer.shape[:2]
            and past.stride() == buffer.stride()
        )


class OwnCache(DynamicCache):
    """What both forms of our cache have."""

    geometry = None  # of the sequence that it holds, see remember_geometry
    in_generate = False  # generate alone has this cache: it may overwrite what it crops

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        if self.in_generate:
            for states in self.growing_states():
                states.used = min(states.used, self.get_seq_length())


if DynamicLayer is None:

    class GrowingCache(OwnCache):
        """A DynamicCache that appends in place (transformers below 4.54)."""

        def __init__(self):
            super().__init__()
            self._states: list[tuple[GrowingStates, GrowingStates]] = []

        def growing_states(self) -> list[GrowingStates]:
            return [states for layer in self._states for states in layer]

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs=None):
            if layer_idx == 0 and hasattr(self, "_seen_tokens"):  # 4.36-4.53: kept by the base class's own update
                self._seen_tokens += key_states.shape[-2]
            while layer_idx >= len(self.key_cache):  # a pruned model leaves layers out
                self._states.append((GrowingStates(), GrowingStates()))
                self.key_cache.append(None)
                self.value_cache.append(None)
            keys, values = self._states[layer_idx]
            self.key_cache[layer_idx] = keys.append(self.key_cache[layer_idx], key_states)
            self.value_cache[layer_idx] = values.append(self.value_cache[layer_idx], value_states)
            return self.key_cache[layer_idx], self.value_cache[layer_idx]

        def reserve(self, new: Tensor, layer_idx: int):
            if layer_idx == 0 and hasattr(self, "_seen_tokens"):
                self._seen_tokens += new.shape[-2]
            for cache, states in zip((self.key_cache, self.value_cache), self._states[layer_idx]):
                cache[layer_idx] = states.reserve(cache[layer_idx], new)
            return self.key_cache[layer_idx], self.value_cache[layer_idx]
else:

    class GrowingLayer(DynamicLayer):
        """A cache layer that appends in place (transformers 4.54 and later)."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._key_states, self._value_states = GrowingStates(), GrowingStates()

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
            past = (self.keys, self.values) if self.get_seq_length() else (None, None)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys = self._key_states.append(past[0], key_states)
            self.values = self._value_states.append(past[1], value_states)
            return self.keys, self.values

        def reserve(self, new: Tensor):
            self.keys = self._key_states.reserve(self.keys, new)
            self.values = self._value_states.reserve(self.values, new)
            return self.keys, self.values

    class GrowingCache(OwnCache):
        """A DynamicCache whose layers append in place."""

        def __init__(self):
            super().__init__()
            self.layer_class_to_replicate = GrowingLayer

        def growing_states(self) -> list[GrowingStates]:
            return [states for layer in self.layers for states in (layer._key_states, layer._value_states)]


def one_of(*caches):
    """The cache among the arguments that different versions give it in; None where there is none."""
    given = [cache for cache in caches if cache is not None]
    if any(cache is not given[0] for cache in given):
        raise ValueError("two different caches, as past_key_values and as cache: give one")
    return given[0] if given else None


def as_cache(past):
    """None, a tuple of (keys, values) [B, H, n, D] per layer, or any transformers Cache -> a cache with `update`."""
    if past is None:
        return GrowingCache()
    if isinstance(past, (tuple, list)):
        cache = GrowingCache()
        for layer_idx, (keys, values) in enumerate(past):
            cache.update(keys, values, layer_idx)
        return cache
    return past


def give_cache(model, arguments: tuple, options: dict):
    """Puts into the options of `generate` the cache that it is to use, under the name that this version knows: the
    caller's, or where generate would make a DynamicCache, one that grows in place.

    Returns:
        that cache; None where generate uses none, or makes one of another kind.
    """
    given = one_of(options.pop("past_key_values", None), options.pop("cache", None))
    if given is None:
        of_call = (*arguments[:1], options.get("generation_config"))  # 4.23 has another argument there
        configs = (*of_call, getattr(model, "generation_config", None), model.config)
        sources = [options, *(vars(config) for config in configs if hasattr(config, "use_cache"))]

        def chosen(name: str):
            return next((source[name] for source in sources if source.get(name) is not None), None)

        if not chosen("use_cache") or chosen("cache_implementation") is not None or options.get("custom_generate"):
            return None
        makes_caches = hasattr(GenerationMixin, "_prepare_cache_for_generation")  # older ones may share it with:
        if options.get("assistant_model") is not None and not makes_caches:
            return None
    options[CACHE_NAME] = cache = as_cache(given)
    return cache


@contextlib.contextmanager
def cache_of_generate(cache):
    """While this lasts, generate alone has the cache."""
    own = isinstance(cache, GrowingCache)
    if own:
        cache.in_generate = True
    try:
        yield
    finally:
        if own:
            cache.in_generate = False


_geometries: dict = {}  # id of a cache that is not ours (some cannot be hashed) -> weak reference to it, geometry


def remember_geometry(cache, geometry) -> None:
    """Keeps with a cache where its context ends; who only has the new tokens cannot see it."""
    if isinstance(cache, GrowingCache):
        cache.geometry = geometry
    elif cache is not None and not is_tracing():
        place = id(cache)
        _geometries[place] = weakref.ref(cache, lambda _: _geometries.pop(place, None)), geometry


def geometry_of(cache):
    """What `remember_geometry` kept, or None."""
    if cache is None or isinstance(cache, GrowingCache):
        return getattr(cache, "geometry", None)
    reference, geometry = (None, None) if is_tracing() else _geometries.get(id(cache), (None, None))
    return geometry if reference is not None and reference() is cache else None


def grows_in_place(cache) -> bool:
    """Whether `reserve` serves this cache."""
    return isinstance(cache, GrowingCache)


def cached_states(cache, layer_idx: int) -> tuple[Tensor, ...]:
    """Keys and values of a layer, or nothing where it has none."""
    if DynamicLayer is None:
        layers = [(cache.key_cache[i], cache.value_cache[i]) for i in [layer_idx] if i < len(cache.key_cache)]
    else:
        layers = [(layer.keys, layer.values) for layer in cache.layers[layer_idx : layer_idx + 1]]
    return tuple(states for layer in layers for states in layer if states is not None)


def reserve(cache, layer_idx: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values of a layer, [B, H, K, D] each, with room at the end for `new` [B, H, s, D], which counts as
    cached from now on and is written by the caller."""
    return cache.reserve(new, layer_idx) if DynamicLayer is None else cache.layers[layer_idx].reserve(new)


def cached_length(cache):
    """Tokens in the cache: an int, but under torch.compile a tensor where a static cache counts them in one."""
    length = 0 if cache is None else cache.get_seq_length()
    return length if isinstance(length, int) or is_tracing() else int(length)


def fixed_length(cache) -> Optional[int]:
    """Slots of a static cache, which hands out all of them at each update; None for caches that grow."""
    if cache is None or isinstance(cache, DynamicCache):
        return None
    length = getattr(cache, "max_cache_len", None)
    if length is None and getattr(cache, "layers", None):
        length = getattr(cache.layers[0], "max_cache_len", None)
    return length


try:  # 4.48
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:
    ALL_ATTENTION_FUNCTIONS = {}
try:  # 4.53
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
except ImportError:
    ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask = {}, None, None


def chosen_attention(config):
    """The function that somebody registered with transformers' AttentionInterface under the name that the model is set
    to; None where it is a built-in one."""
    name = getattr(config, "_attn_implementation", None)
    function = (
        None if name in (None, "eager") or name not in ALL_ATTENTION_FUNCTIONS else ALL_ATTENTION_FUNCTIONS[name]
    )
    own = name == "sdpa" and getattr(function, "__module__", "").startswith("transformers.")
    return None if own else function


def chosen_mask(config, visible: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """The mask for such a function: bool, True for keys that are read; one to add to the scores where transformers'
    `eager_mask` is registered for it with AttentionMaskInterface.

    Raises:
        ValueError: a mask of another kind is registered, which a GLM context cannot be put into.
    """
    name = config._attn_implementation
    asked = ALL_MASK_ATTENTION_FUNCTIONS.get(name, sdpa_mask)
    if visible is None or asked is sdpa_mask:
        return visible
    if asked is eager_mask:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    raise ValueError(
        f"the mask registered for attn_implementation = {name!r} is {asked!r}: ChatGLM's is no causal one, register "
        "transformers' sdpa_mask or eager_mask for it"
    )


def generation_settings(model):
    """Where the defaults of `generate` stand: in the model's configuration below 4.25."""
    return getattr(model, "generation_config", model.config)


def is_tracing() -> bool:
    """Under torch.compile, export or tracing a look at the data would break the graph."""
    compiler = getattr(torch, "compiler", None)
    return torch.jit.is_tracing() or bool(compiler and getattr(compiler, "is_compiling", bool)())


class Past:
    """What the blocks put before their new keys and values: a cache, or without one a P-tuning prefix, or nothing."""

    def __init__(self, cache, prefix: Optional[list[tuple[Tensor, Tensor]]], new_tokens: int, device: torch.device):
        self.cache, self.prefix, self.arguments = cache, prefix, ()
        if fixed_length(cache) is not None:  # before transformers 5 static caches are told which slots to write to
            self.arguments = ({"cache_position": torch.arange(new_tokens, device=device) + cached_length(cache)},)

    def extend(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, S, D] -> those of all tokens, [B, H, K, D]."""
        if self.cache is not None:
            return self.cache.update(key, value, layer_idx, *self.arguments)
        if self.prefix is None:
            return key, value
        before, after = self.prefix[layer_idx], (key, value)
        return tuple(torch.cat((old.to(new), new), dim=2) for old, new in zip(before, after))


def chat_returns_dict() -> bool:
    """Whether `apply_chat_template` returns a BatchEncoding unless told otherwise: from 5.0 on, not below."""
    method = getattr(PreTrainedTokenizer, "apply_chat_template", None)  # 4.34
    parameter = inspect.signature(method).parameters.get("return_dict") if method else None
    return bool(parameter and parameter.default)


# ---------------------------------------------------------------------------------------------------------------------
# Loading, saving, checkpointing
# ---------------------------------------------------------------------------------------------------------------------


class VersionedModel(PreTrainedModel):
    """PreTrainedModel with one behaviour on every version."""

    supports_gradient_checkpointing = True
    checkpoint_every, checkpoint_function = 1, staticmethod(checkpoint.checkpoint)
    _supports_sdpa = True  # asked for since 4.36, as the next one is until 4.5x
    _supports_cache_class = True
    _supports_static_cache = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        """As in transformers, but for this: without a dtype the checkpoint's own is kept (4.x would widen it to
        float32); weights go straight into place where accelerate is installed; loads of several threads take turns,
        because transformers changes things for the whole process meanwhile; what is frozen stays so (5.x makes new
        parameters); what has no numbers yet gets some."""
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            renamed = any(hasattr(cls.config_class, name) for name in ("dtype", "torch_dtype"))  # 4.56
            kwargs["dtype" if renamed else "torch_dtype"] = "auto"
        new_prefix = kwargs.get("pre_seq_len") or getattr(kwargs.get("config"), "pre_seq_len", None)
        completes = hasattr(transformers, "GenerationConfig")  # below 4.25 what is new cannot be made on the way
        kwargs.setdefault("low_cpu_mem_usage", has_accelerate() and (completes or not new_prefix))
        with loading_lock(), cls._unmentioned_head(kwargs.pop("head_is_tied", False)):
            loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        fill_missing(model)
        model.freeze()
        return loaded

    @classmethod
    @contextlib.contextmanager
    def _unmentioned_head(cls, is_tied: bool):
        """Versions that know nothing of tied keys (below 4.28) call a tied head "newly initialized"."""
        known = cls._keys_to_ignore_on_load_missing
        if is_tied and not hasattr(PreTrainedModel, "_tied_weights_keys"):
            cls._keys_to_ignore_on_load_missing = [r"^lm_head\."]
        try:
            yield
        finally:
            cls._keys_to_ignore_on_load_missing = known

    def freeze(self) -> None:
        """Takes the gradient from parameters that are not to be trained."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. Where the default is pytorch_model.bin (below 4.35) and safetensors are asked for, it
        must be told not to store a tied head twice, and takes modeling_chatglm.py for an old weight file."""
        asked = inspect.signature(PreTrainedModel.save_pretrained).parameters.get("safe_serialization")
        if asked is None or asked.default is not False or not kwargs.get("safe_serialization"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        self._keys_to_ignore_on_save = list(self._tied_weights_keys) if self.config.tie_word_embeddings else None
        super().save_pretrained(save_directory, *args, **kwargs)
        custom_object_save(self, save_directory, config=self.config)
        return None

    if hasattr(PreTrainedModel, "_set_gradient_checkpointing"):  # 4.35; 5.23 adds the layers between

        def _set_gradient_checkpointing(
            self, enable=True, gradient_checkpointing_func=checkpoint.checkpoint, every_n_layers: int = 1
        ):
            for module in self.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing, module.checkpoint_every = enable, every_n_layers
                    module.checkpoint_function = gradient_checkpointing_func
    else:  # called for each module

        def _set_gradient_checkpointing(self, module, value=False):
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value

    def checkpointed(self, layer: nn.Module, layer_idx: int):
        """The layer as a function that keeps nothing for its backward pass, where checkpointing asks for that. Never
        reentrant: that form loses the gradient of a P-tuning prefix."""
        if not (self.gradient_checkpointing and self.training) or layer_idx % self.checkpoint_every:
            return layer
        return functools.partial(self.checkpoint_function, layer, use_reentrant=False)


def loading_lock():
    """One lock for the process: each checkpoint's folder has a copy of this file, all share transformers."""
    return vars(transformers).setdefault("_chatglm_loading_lock", threading.RLock())


@functools.cache
def has_accelerate() -> bool:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return False
    return True


def fill_missing(model: PreTrainedModel) -> None:
    """Initialises what is neither in the checkpoint nor offloaded: 4.36 to 4.49 take new tensors of equal size for
    tied ones, and leave them on the meta device without a word."""
    missing = [
        (name, module)
        for name, module in model.named_modules()
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)) and not hasattr(module, "_hf_hook")
    ]
    if not missing:
        return
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), "cpu")
    for _, module in missing:
        loaded = {name: own for name, own in module.named_parameters(recurse=False) if not own.is_meta}
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        module._parameters.update(loaded)
    logger.warning(f"newly initialized, because the checkpoint has none: {', '.join(name for name, _ in missing)}")


SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


def check_weight_files(folder: str, without_weights: str) -> None:
    """Raises an OSError of one line where a look at the files of a local folder shows why they cannot be loaded."""
    names = set(os.listdir(folder))
    found = next((n for name in SINGLE_FILES for n in (name, f"{name}.index.json") if n in names), None)
    shards = sorted(filter(SHARD.search, names))
    if found is None and shards:
        single = SINGLE_FILES[shards[0].endswith(".bin")]
        raise OSError(
            f"{folder} has {len(shards)} shards of weights but no {single}.index.json: download that file too"
        )
    if found is None and not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise OSError(f"{folder}: {without_weights}")
    for name in files_of_index(os.path.join(folder, found)) if found else ():
        if name not in names:
            raise OSError(f"{folder}: {found} names {name}, which is not there: download that file too")
        fault = fault_of_file(os.path.join(folder, name))
        if fault:
            raise OSError(f"{os.path.join(folder, name)} {fault}")


def files_of_index(path: str) -> list[str]:
    """The shards that an index file names, and itself; of a single file itself alone."""
    own = [os.path.basename(path)]
    if not path.endswith(".json") or fault_of_file(path):
        return own
    with open(path, encoding="utf-8") as file:
        return own + sorted(set(json.load(file)["weight_map"].values()))


def fault_of_file(path: str) -> Optional[str]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return "is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it again"
        whole = size
        if path.endswith(".safetensors") and size >= 8:
            header = int.from_bytes(start[:8], "little")
            file.seek(8)
            tensors = json.loads(file.read(header)) if 8 + header <= size <= 8 + header + 2**40 else {}
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
            whole = 8 + header + max(ends, default=0)
        cut_zip = path.endswith(".bin") and start.startswith(b"PK") and not zipfile.is_zipfile(path)
    if size < whole or cut_zip or not size:
        return f"ends after {size:,} bytes: it was downloaded only in part; download it again"
    return None
