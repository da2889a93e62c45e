"""An image encoder from a local folder: the vision tower of CLIP or SigLIP, by transformers.

The folder is as Hugging Face's hub has it: config.json, safetensors, preprocessor_config.json. No
code and no pickle of the folder is run, nothing is fetched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vico.errors import UserError, fail, one_line, show
from vico.io.digest import digest_files
from vico.io.paths import entries, exists, is_folder
from vico.io.text import read_json_object
from vico.video.frames import Frames

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
NEEDED = (
    "needed are config.json, model*.safetensors and preprocessor_config.json, as in the folder "
    "openai/clip-vit-large-patch14 of Hugging Face's hub"
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_LEVEL = 1e6  # of a mean or a std; no bound of sense, but JSON knows numbers without an end
# `model_type` of config.json: (kind, whether the vision tower is a part of it)
MODEL_TYPES = {
    "clip": ("clip", True),
    "clip_vision_model": ("clip", False),
    "siglip": ("siglip", True),
    "siglip_vision_model": ("siglip", False),
}
# Of the vision tower's settings: the largest value. No others but WORDS reach transformers.
SIZES = {
    "hidden_size": 1 << 14,
    "intermediate_size": 1 << 16,
    "projection_dim": 1 << 14,
    "num_hidden_layers": 200,
    "num_attention_heads": 1 << 10,
    "image_size": 1 << 11,
    "patch_size": 1 << 8,
}
WORDS = ("hidden_act", "layer_norm_eps", "vision_use_head")


@dataclass(frozen=True)
class Encoder:
    """Pictures to features. `size`: the side of a picture, in pixels."""

    model: Any
    kind: str  # clip or siglip
    size: int
    width: int  # of the features
    mean: Tensor  # [3, 1, 1], on the model's device, as `std`
    std: Tensor
    scale: float  # of a byte
    dtype: torch.dtype
    digest: str  # of the files
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @torch.inference_mode()
    def encode(self, frames: Frames | Tensor) -> Tensor:
        """Bytes [T, size, size, 3] to features [T, width], fp32 on the host, not normalised.

        CLIP's projected embedding, as OpenAI's `encode_image`; SigLIP's pooled output.
        """
        pixels = torch.as_tensor(frames).to(self.device).permute(0, 3, 1, 2)
        images = (pixels.float() * self.scale - self.mean) / self.std
        with _without_tf32() if self.device.type == "cuda" else nullcontext():
            output = self.model(pixel_values=images.to(self.dtype))
        embeds = output.image_embeds if self.kind == "clip" else output.pooler_output
        features: Tensor = embeds.float().cpu()
        return features


def _without_tf32() -> Any:
    """cuDNN would round a convolution in fp32 to TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def load_encoder(
    folder: Path, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Encoder:
    """The encoder in `folder`. Raises UserError for a folder without one, or with a damaged one."""
    weights = _weight_files(folder)
    config_path = folder / CONFIG
    kind, settings = _vision_settings(read_json_object(config_path, "the encoder's"), config_path)
    mean, std, scale, source = _preprocessing(folder, kind, settings["image_size"])
    model = _load(folder, kind, settings).to(device=device, dtype=DTYPES[precision])
    files = [config_path, *weights, *([] if source is None else [source])]
    notes = () if source else (f"{folder}: no {PREPROCESSOR}; mean and std are {kind}'s usual",)
    shape = (3, 1, 1)
    return Encoder(
        model=model,
        kind=kind,
        size=settings["image_size"],
        width=settings["projection_dim" if kind == "clip" else "hidden_size"],
        mean=torch.tensor(mean).reshape(shape).to(device),
        std=torch.tensor(std).reshape(shape).to(device),
        scale=scale,
        dtype=DTYPES[precision],
        digest=digest_files(files),
        notes=notes,
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of the folder. Raises UserError where it has none, or a damaged one."""
    if not is_folder(folder):
        kind = "a file" if exists(folder) else "no such folder"
        if folder.suffix == ".pt" and exists(folder):
            kind = "a file of OpenAI's, which holds code (TorchScript) that is not run"
        fail(f"--encoder {folder}: {kind}; name a folder; {NEEDED}")
    weights = entries(folder, "model*.safetensors")
    if not weights:
        others = [*entries(folder, "*.bin"), *entries(folder, "*.pt"), *entries(folder, "*.pth")]
        has = f"{others[0].name}, whose pickle or code is not run" if others else "no weights"
        fail(f"--encoder {folder}: holds {has}; {NEEDED}")
    if exists(folder / "adapter_config.json"):
        fail(f"--encoder {folder}: holds an adapter (adapter_config.json); {NEEDED}")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as problem:
            fail(f"{path}: no whole safetensors file ({problem}); fetch or copy it again")
    return weights


def _vision_settings(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """(kind, settings of the vision tower). Raises UserError."""
    name = config.get("model_type")
    if name not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        fail(f"{path}: model_type is {show(name)}; one of {known} is expected")
    kind, is_part = MODEL_TYPES[name]
    vision = config.get("vision_config") if is_part else config
    if not isinstance(vision, Mapping):
        fail(f"{path}: vision_config is {show(vision)}, not a JSON object")
    from transformers import CLIPVisionConfig, SiglipVisionConfig  # late: seconds of import

    config_class = CLIPVisionConfig if kind == "clip" else SiglipVisionConfig
    defaults = config_class().to_dict()
    settings = {key: vision.get(key, defaults[key]) for key in (*SIZES, *WORDS) if key in defaults}
    for key, largest in SIZES.items():
        value = settings.get(key, 1)
        if type(value) is not int or not 1 <= value <= largest:
            fail(f"{path}: {key} is {show(value)}; a whole number of 1 to {largest:,} is expected")
    if settings["hidden_size"] % settings["num_attention_heads"]:
        fail(f"{path}: num_attention_heads does not divide hidden_size")
    if settings["patch_size"] > settings["image_size"]:
        fail(f"{path}: patch_size is larger than image_size")
    epsilon = settings["layer_norm_eps"]
    if type(epsilon) is not float or not 0 < epsilon < 1:
        fail(f"{path}: layer_norm_eps is {show(epsilon)}; a number between 0 and 1 is expected")
    if kind == "siglip" and settings.get("vision_use_head", True) is not True:
        fail(f"{path}: vision_use_head is off: this encoder has no pooled output")
    return kind, settings


def _preprocessing(
    folder: Path, kind: str, image_size: int
) -> tuple[tuple[float, ...], tuple[float, ...], float, Path | None]:
    """(mean, std, scale of a byte, the file that says so). Raises UserError."""
    usual = (CLIP_MEAN, CLIP_STD) if kind == "clip" else ((0.5,) * 3, (0.5,) * 3)
    path = folder / PREPROCESSOR
    content: object
    if exists(path):
        content = read_json_object(path, "the encoder's preprocessing")
    elif exists(folder / "processor_config.json"):  # where transformers 5 writes it
        path = folder / "processor_config.json"
        content = read_json_object(path, "the encoder's preprocessing").get("image_processor")
    else:
        return *usual, 1 / 255, None
    if not isinstance(content, Mapping):
        fail(f"{path}: image_processor is {show(content)}, not a JSON object")
    for key in ("crop_size", "size"):
        if (side := _side(content.get(key))) not in (None, image_size):
            fail(f"{path}: {key} is {side} pixels, where config.json has {image_size}")
    mean = _three(content, "image_mean", usual[0], path)
    std = _three(content, "image_std", usual[1], path)
    scale = content.get("rescale_factor", 1 / 255)
    if not all(value > 0 for value in std) or type(scale) is not float or not 0 < scale <= 1:
        fail(f"{path}: image_std and rescale_factor must be above 0")
    return mean, std, scale, path


def _side(value: object) -> object:
    """The shorter side of a size in transformers' various forms; None: not said."""
    if isinstance(value, Mapping):
        return value.get("shortest_edge", value.get("height"))
    return value


def _three(
    content: Mapping[str, Any], key: str, usual: tuple[float, ...], path: Path
) -> tuple[float, ...]:
    value = content.get(key, usual)
    is_list = isinstance(value, list | tuple) and len(value) == 3
    if not is_list or not all(type(v) in (int, float) and abs(v) <= MAX_LEVEL for v in value):
        fail(f"{path}: {key} is {show(value)}; three numbers are expected")
    return tuple(map(float, value))


def _load(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """The vision tower with its weights. Raises UserError for weights of another shape."""
    import transformers

    classes: dict[str, tuple[Any, Any]] = {
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModelWithProjection),
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }
    config_class, model_class = classes[kind]
    try:
        with _silent(transformers.utils.logging):
            model, report = model_class.from_pretrained(
                folder,
                config=config_class(**settings),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as problem:  # the library raises what it likes at odd settings and shapes
        reason = one_line(str(problem).strip())
        raise UserError(f"--encoder {folder}: cannot be loaded ({reason}); {NEEDED}") from None
    if missing := sorted(report["missing_keys"]):
        fail(
            f"--encoder {folder}: its weights lack {missing[0]} and {len(missing) - 1} others of "
            f"{model_class.__name__}; {NEEDED}"
        )
    for parameter in model.parameters():
        # Out of the mapped file, where their alignment, and so the last bit of a sum, is chance.
        parameter.data = parameter.data.clone()
    return model.eval()


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """transformers warns of the text tower, which is not loaded, and shows a progress bar."""
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
