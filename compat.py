"""The one door for transformers' versions (4.23 to 5.24): caches, attention, generation, loading, saving.

Every question about a version is asked here, each with the version that changed the answer.

transformers' DynamicCache concatenates, which copies the whole past for every new token. In a GrowingCache the keys
and values of a layer are views of a buffer with room for more, so that a new token is written in place; everything
else (crop, beam reordering, batching) stays the base class's, because it only ever sees the views.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import json
import os
import re
import threading
import weakref
import zipfile
from pathlib import Path

import huggingface_hub
import torch
import transformers
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import modeling_utils
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_accelerate_available, logging

from .configuration_chatglm import model_card, warn_once

try:  # 4.25
    from transformers import GenerationMixin
except ImportError:
    from transformers.generation_utils import GenerationMixin

try:  # 4.36
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache
except ImportError:
    cache_utils = None

    class DynamicCache:  # what GrowingCache needs of it
        def __init__(self):
            self.key_cache, self.value_cache = [], []

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.key_cache[layer_idx].shape[-2] if len(self.key_cache) > layer_idx else 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for layers in (self.key_cache, self.value_cache):
                layers[:] = [old if old is None else old.index_select(0, beam_idx.to(old.device)) for old in layers]


HAS_CACHES = DynamicCache.__module__.startswith("transformers.")  # 4.36
try:  # 4.53
    from transformers import masking_utils
except ImportError:
    masking_utils = None
DynamicLayer = getattr(cache_utils, "DynamicLayer", None)  # 4.54
ALL_ATTENTION_FUNCTIONS = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})  # 4.48

# What generate calls the cache: "past_key_values" before 5.24, "cache" since then, as outputs do.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
logger = logging.get_logger(__name__)
CHUNK = 256  # tokens of room that a full buffer grows by: 112 MiB for the 6B model in 16 bit


class GrowingStates:
    """The keys, or the values, of one layer: the front [B, H, n, D] of a buffer with room for more tokens."""

    buffer = front = None

    def append(self, past: Tensor | None, new: Tensor) -> Tensor:
        """past [B, H, n, D] or None, new [B, H, s, D] -> [B, H, n + s, D]. A `past` that is not what the last call
        returned (but cropped, reordered, loaded) is copied into a new buffer, so that whoever kept it keeps it."""
        used = past.shape[-2] if past is not None and past.numel() else 0
        if torch.is_grad_enabled() and (new.requires_grad or (used and past.requires_grad)):
            # Autograd keeps the past: don't write into it. A P-tuning prefix may come from another device.
            return new if not used else torch.cat((past.to(new), new), dim=-2)
        total, old = used + new.shape[-2], self.buffer
        fits = used and past is self.front and total <= old.shape[-2]
        writable = fits and (torch.is_inference_mode_enabled() or not old.is_inference())
        if not writable or (new.dtype, new.device) != (old.dtype, old.device):
            batch, heads, _, size = new.shape
            self.buffer = new.new_empty(batch, heads, total + CHUNK - total % CHUNK, size)
            if used:
                self.buffer[:, :, :used] = past
        self.buffer.narrow(2, used, new.shape[-2]).copy_(new)
        self.front = self.buffer.narrow(2, 0, total)
        return self.front


class GrowingCache(DynamicCache):
    """A DynamicCache whose `update` writes behind what it holds, and copies nothing else."""

    def __init__(self):
        super().__init__()
        self.growing = collections.defaultdict(GrowingStates)  # by layer and place among (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        past = cached_states(self, layer_idx) or (None, None)
        keys = self.growing[layer_idx, 0].append(past[0], key_states)
        values = self.growing[layer_idx, 1].append(past[1], value_states)
        if DynamicLayer is None:
            for layers, states in ((self.key_cache, keys), (self.value_cache, values)):
                layers += [None] * (layer_idx + 1 - len(layers))  # a pruned model leaves layers out
                layers[layer_idx] = states
        else:
            self.layers += [DynamicLayer() for _ in range(layer_idx + 1 - len(self.layers))]
            layer = self.layers[layer_idx]
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        return keys, values


def given_cache(past_key_values=None, cache=None, past=None, **others):
    """The cache among the arguments of a call, as one with `update`; None for no cache. It is given as the first one
    from 4.26 to 5.23, as the second one later, and as the third one before."""
    return as_cache(next((one for one in (past_key_values, cache, past) if one is not None), None))


def as_cache(past):
    """A Cache of transformers as it is; a tuple of (keys, values) [B, H, n, D] per layer in one that grows."""
    if not isinstance(past, (tuple, list)):
        if DynamicLayer is None and isinstance(getattr(past, "key_cache", None), Tensor):
            raise ValueError("StaticCache of transformers 4.38 to 4.40 holds one layer: take 4.41, or DynamicCache")
        return past
    cache = GrowingCache()
    for layer_idx, (keys, values) in enumerate(past):
        cache.update(keys, values, layer_idx)
    return cache


def chosen_setting(model, arguments: tuple, options: dict, name: str):
    """What generate(inputs, *arguments, **options) takes for a setting: the first that is not None."""
    # 4.23 has something else as the first argument; below 4.25 the model's configuration holds the defaults
    given, own = options.get("generation_config"), getattr(model, "generation_config", None)
    configs = [config for config in (*arguments[:1], given, own, model.config) if hasattr(config, "use_cache")]
    sources = [options, *map(vars, configs)]
    return next((source[name] for source in sources if source.get(name) is not None), None)


@contextlib.contextmanager
def cache_for_generate(model, arguments: tuple, options: dict):
    """Puts into the options of `generate` the cache that it is to use, under the name that this version knows: the
    caller's, or where generate would make a DynamicCache, one that grows in place."""
    cache = given_cache(**{name: options.pop(name, None) for name in ("past_key_values", "cache")})
    use_cache, kind = (chosen_setting(model, arguments, options, n) for n in ("use_cache", "cache_implementation"))
    is_ours = cache is None and use_cache and not (kind or options.get("custom_generate"))
    if is_ours and options.get("assistant_model") and not HAS_CACHES:  # it runs the model on tokens without positions
        raise ValueError(f"assistant_model needs transformers 4.36 or newer, this is {transformers.__version__}")
    # 4.44 and older may share a cache with the assistant
    may_share = options.get("assistant_model") and not hasattr(GenerationMixin, "_prepare_cache_for_generation")
    if is_ours and not may_share:
        cache = GrowingCache()
    if cache is not None:
        options[CACHE_NAME] = cache
    yield
    if cache is not None and not int(cached_length(cache)):
        warn_once(
            "generate made no use of its cache, so each token computed the whole text again: this version of "
            "transformers hands it over in another way than ChatGLM-6B-Slim knows; see the versions in its README"
        )


_geometries: dict = {}  # with the keys they are for, by the id of a cache, some of which cannot be hashed


def remember_geometry(cache, geometry) -> None:
    """Keeps where the context of a cache ends; who only has the new tokens cannot see it."""
    if cache is not None and not is_tracing():
        if id(cache) not in _geometries:
            weakref.finalize(cache, _geometries.pop, id(cache))
        _geometries[id(cache)] = geometry, keys_of(cache)


def geometry_of(cache):
    """What `remember_geometry` kept; None where there is nothing, or the cache has other rows since then."""
    geometry, keys = (None, None) if cache is None or is_tracing() else _geometries.get(id(cache), (None, None))
    return geometry if keys is None or keys.data_ptr() == keys_of(cache).data_ptr() else None  # cropping keeps it


def keys_of(cache) -> Tensor | None:
    """The keys of the first layer of a DynamicCache."""
    return next(iter(cached_states(cache, 0)), None) if isinstance(cache, DynamicCache) else None


def cached_states(cache, layer_idx: int) -> tuple[Tensor, ...]:
    """Keys and values of a layer, or nothing where it has none."""
    if DynamicLayer is None:
        layers = [(cache.key_cache[i], cache.value_cache[i]) for i in [layer_idx] if i < len(cache.key_cache)]
    else:
        layers = [(layer.keys, layer.values) for layer in cache.layers[layer_idx : layer_idx + 1]]
    return tuple(states for layer in layers for states in layer if states is not None)


def cached_length(cache):
    """Tokens in the cache: an int, but under torch.compile a tensor where a static cache counts them in one."""
    length = 0 if cache is None else cache.get_seq_length()
    return length if isinstance(length, int) or is_tracing() else int(length)


def fixed_length(cache) -> int | None:
    """Slots of a static cache, which hands out all of them at each update; None for caches that grow."""
    if cache is None or isinstance(cache, DynamicCache):
        return None
    return getattr((getattr(cache, "layers", None) or [cache])[0], "max_cache_len", None)  # of its layers since 4.54


def chosen_attention(config):
    """The name of a built-in attention, or the function that somebody registered with transformers' AttentionInterface
    (4.48) under the name that the model is set to (4.36). Its mask is bool, True for keys that are read.

    Raises:
        ValueError: a mask of another kind is registered for it (4.53).
    """
    name = getattr(config, "_attn_implementation", None) or "sdpa"
    function = ALL_ATTENTION_FUNCTIONS[name] if name != "eager" and name in ALL_ATTENTION_FUNCTIONS else None
    if function is None or (name == "sdpa" and getattr(function, "__module__", "").startswith("transformers.")):
        return name
    mask = masking_utils and masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if mask is None or mask is masking_utils.sdpa_mask:
        return function
    raise ValueError(
        f"the mask of attn_implementation = {name!r} is {mask!r}: ChatGLM's is no causal one, register transformers' "
        "sdpa_mask for it, whose masks are bool"
    )


def is_tracing() -> bool:
    """Under torch.compile, export or tracing a look at the data would break the graph."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class Past:
    """What the blocks put before their new keys and values: the tokens of a cache, and in front of the first ones a
    P-tuning prefix, (keys, values) [B, H, P, D] for each layer."""

    def __init__(self, cache, prefix: list[tuple[Tensor, Tensor]] | None, new_tokens: int, device: torch.device):
        self.cache, self.prefix, self.arguments = cache, prefix, ()
        if fixed_length(cache) is not None:  # before transformers 5 static caches are told which slots to write to
            slots = torch.arange(new_tokens + (prefix[0][0].shape[2] if prefix else 0), device=device)
            self.arguments = ({"cache_position": slots + cached_length(cache)},)

    def extend(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, S, D] -> those of all tokens, [B, H, K, D]."""
        if self.prefix is not None:
            pairs = zip(self.prefix[layer_idx], (key, value))
            key, value = (torch.cat((before.to(new), new), dim=2) for before, new in pairs)
        return (key, value) if self.cache is None else self.cache.update(key, value, layer_idx, *self.arguments)


# ---- Loading, saving, checkpointing ---------------------------------------------------------------------------------


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
        """As in transformers, but: weights that are not what they are loaded as are refused; without a dtype the
        checkpoint's own is kept (4.x would widen it to float32); weights go straight into place where accelerate is
        installed; loads of several threads take turns, because transformers changes things for the whole process
        meanwhile; what is frozen stays so (5.x makes new parameters); what has no numbers yet gets some."""
        if not kwargs.get("state_dict"):
            check_weight_files(os.path.join(path, kwargs.get("subfolder") or ""))
            cls.check_format(path, kwargs)
        warn_of_other_code(path)
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            renamed = any(hasattr(cls.config_class, name) for name in ("dtype", "torch_dtype"))  # 4.56
            kwargs["dtype" if renamed else "torch_dtype"] = "auto"
        new_prefix = kwargs.get("pre_seq_len") or getattr(kwargs.get("config"), "pre_seq_len", None)
        completes = hasattr(transformers, "GenerationConfig")  # below 4.25 what is new cannot be made on the way
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available() and (completes or not new_prefix))
        # one lock for the process: each checkpoint's folder has a copy of this file, all share transformers
        with vars(transformers).setdefault("_chatglm_loading_lock", threading.RLock()):
            loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.config.check_processes(getattr(model, "tp_size", None) or 1)
        fill_missing(model)
        model.freeze()
        return loaded

    if not HAS_CACHES:  # 4.23 to 4.3x call a tied head "newly initialized"

        @classmethod
        def _load_pretrained_model(cls, model, *args, **kwargs):
            is_tied = model.config.tie_word_embeddings
            cls._keys_to_ignore_on_load_missing = [r"^lm_head\."] if is_tied else None
            return super()._load_pretrained_model(model, *args, **kwargs)

    if hasattr(PreTrainedModel, "mark_tied_weights_as_initialized"):  # 5.0

        def mark_tied_weights_as_initialized(self, *info):
            """Without this 5.3 forgets that a tied head is missing from the files, and fills it at random."""
            missing = set(info[0].missing_keys) if info else set()
            super().mark_tied_weights_as_initialized(*info)
            if info:
                info[0].missing_keys |= missing & set(self.all_tied_weights_keys)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, and with a model card where there is none. Where the default is pytorch_model.bin (below
        4.35) and safetensors are asked for, it must be told not to store a tied head twice, and takes
        modeling_chatglm.py for an old weight file."""
        card = Path(save_directory, "README.md")
        self._card = card.read_bytes() if card.is_file() else model_card(self.config).encode()
        asked = inspect.signature(PreTrainedModel.save_pretrained).parameters.get("safe_serialization")
        is_other = asked is not None and asked.default is False and kwargs.get("safe_serialization")
        if is_other:
            self._keys_to_ignore_on_save = list(self._tied_weights_keys) if self.config.tie_word_embeddings else None
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_other:
            custom_object_save(self, save_directory, config=self.config)
        if card.parent.is_dir() and not card.is_file():
            card.write_bytes(self._card)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        """Overridden because 4.38 to 5.24 put a card of theirs over this one where the repository has none."""
        if not huggingface_hub.file_exists(repo_id, "README.md", token=kwargs.get("token")):
            Path(working_dir, "README.md").write_bytes(self._card)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Overridden (4.57 to 5.24) because its paged cache knows causal masks alone."""
        raise NotImplementedError(
            "generate_batch, paged caches and `serve --continuous-batching` read a prompt in pieces and causally; a "
            "ChatGLM prompt is read as a whole, in both directions: give generate() a padded batch"
        )

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=checkpoint.checkpoint, every_n_layers: int = 1, **older
    ):
        """Below 4.35 transformers calls this for each module, with `value`, a parameter by whose name later ones tell
        old code; from 5.23 on it can ask for layers between others, and counts only those of a class of its own."""
        network = self.base_model
        network.gradient_checkpointing = older.get("value", enable)
        network.checkpoint_function, network.checkpoint_every = gradient_checkpointing_func, every_n_layers

    def checkpointed(self, layer: nn.Module, layer_idx: int):
        """The layer as a function that keeps nothing for its backward pass, where checkpointing asks for that. Never
        reentrant: that form loses the gradient of a P-tuning prefix."""
        if not (self.gradient_checkpointing and self.training) or layer_idx % self.checkpoint_every:
            return layer
        return functools.partial(self.checkpoint_function, layer, use_reentrant=False)


def fill_missing(model: PreTrainedModel) -> None:
    """Initialises what is neither in the checkpoint nor offloaded: 4.36 to 4.49 take new tensors of equal size for
    tied ones, and leave them on the meta device without a word."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), "cpu")
    for name, module in model.named_modules():
        loaded = {key: own for key, own in module.named_parameters(recurse=False) if not own.is_meta}
        if len(loaded) < len(list(module.parameters(recurse=False))) and not hasattr(module, "_hf_hook"):
            logger.warning(f"newly initialized, because the checkpoint has none: {name}")
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            module._parameters.update(loaded)


# As this process imported it: transformers' copies are replaced by those of the next folder of the same name, and 4.4x
# runs this file again. Without the two that the tokenizer imports, maybe later.
CODE = globals().get("CODE") or {
    file.name: file.read_bytes()
    for file in Path(__file__).parent.glob("*.py")
    if __name__.startswith("transformers_modules.") and file.stem not in ("tokenization_chatglm", "sentencepiece_file")
}


def warn_of_other_code(folder) -> None:
    """Folders of one name share what transformers imports for the first of them in a process, wholly or in part."""
    files = [Path(folder, name) for name in sorted(CODE)]
    other = [file.name for file in files if file.is_file() and file.read_bytes() != CODE[file.name]]
    if other:
        warn_once(
            f"{folder} may be served by the code of another folder of that name, whose {', '.join(other)} this "
            "process has imported before: load it in a process of its own, or give the folder a name of its own"
        )


# In the order in which transformers looks for them.
WEIGHT_FILES = [f"{name}{of}" for name in ("model.safetensors", "pytorch_model.bin") for of in ("", ".index.json")]
SHARD = re.compile(r"-\d{5}-of-\d{5}(\.safetensors|\.bin)$")


def check_weight_files(folder: str) -> None:
    """An OSError of one line where a look at the files of a local folder shows why they cannot be loaded."""
    if not os.path.isdir(folder):
        return
    names = sorted(os.listdir(folder))
    shards = [name for name in names if SHARD.search(name)]
    found = next((name for name in WEIGHT_FILES if name in names), None)
    if found is None and shards:
        index = SHARD.sub(r"\1.index.json", shards[0])
        raise OSError(f"{folder} has {len(shards)} shards of weights but no {index}: download that file too")
    if found is None and not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise OSError(
            f"{folder}: this folder holds the code of ChatGLM-6B-Slim without weights: make a complete folder with "
            "`python slim.py THUDM/chatglm-6b OUTPUT --repackage`, or give from_pretrained a Hub id that has them"
        )
    for name in sorted(named_by(Path(folder, found))) if found else ():
        if name not in names:
            raise OSError(f"{folder}: {found} names {name}, which is not there: download that file too")
        named_by(Path(folder, name))


def named_by(path: Path) -> set[str]:
    """The shards that an index names; none for another file. An OSError for a file that is not whole."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        cure = "run `git lfs pull` in its folder, or download it again"
        raise OSError(f"{path} is a Git-LFS pointer, not the file itself: {cure}")
    try:
        if path.suffix == ".json":
            return set(json.loads(path.read_bytes())["weight_map"].values())
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            safe_open(str(path), "pt").__exit__(None, None, None)
        elif start.startswith(b"PK"):
            zipfile.ZipFile(path).close()
        elif not start:
            raise ValueError("empty")
    except ImportError:  # below 4.31 it may be missing, and is not asked for then
        pass
    except Exception as error:  # SafetensorError is no class of its own in old versions
        size = f"{path.stat().st_size:,} bytes"
        raise OSError(
            f"{path} ends after {size} and cannot be read as a whole ({error}): download it again"
        ) from error
    return set()
