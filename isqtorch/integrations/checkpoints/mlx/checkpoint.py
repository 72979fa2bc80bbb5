"""`MlxCheckpoint`: a folder of MLX, before there is a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from isqtorch.files.checkpoints import checkpoint_files, read_json, special_floats
from isqtorch.integrations.checkpoints.incoming import Checkpoint, Incoming

from .layouts import layout_of
from .settings import KEYS, read_settings
from .weights import MlxWeights

_TEXT = "language_model."
"""The prefix of the text model in a model of images or sound."""
_LAYERS = re.compile(r"(?:.*_)?(?:n_?)?layers?|depth")
_SIZE = re.compile(r"(?:.*_)?(?:heads?|experts?|dims?|rank|width|groups?|size|embd|d_model|labels)")
_MOST_LAYERS = 512  # as in GGUF files
_LEAST_LIMIT = 1 << 18  # some models have settings for parts that were dropped


class MlxCheckpoint(Checkpoint):
    """A folder as mlx-lm writes it: config.json, safetensors files, tokenizer.

    See `Checkpoint`. Nothing is downloaded, and no code in the folder runs.

    Raises:
        ValueError: config.json or a header is damaged, or they do not fit together.
        OSError: a file is missing or cannot be read.
    """

    kind = "MLX"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).expanduser()
        self.where = str(self._folder)
        path = self._folder / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{self.where}: no config.json, so it is no MLX folder")
        self._config = read_json(path)
        settings = read_settings(self._config, path)
        files = checkpoint_files(self._folder, "load")
        self.files = tuple(os.path.abspath(file) for file in files)
        self._weights = MlxWeights(self.where, files, settings)
        self.elements = self._weights.elements()
        self._check_sizes(self._config, path)
        self._prefix = ""
        text = self._config.get("text_config")
        if isinstance(text, dict) and all(key.startswith(_TEXT) for key in self._weights.keys):
            # mlx-lm drops what is not text, and leaves the configuration as it was.
            tied = self._config.get("tie_word_embeddings")
            self._config = ({} if tied is None else {"tie_word_embeddings": tied}) | text
            self._prefix = _TEXT
        self._layout = layout_of(self._config.get("model_type"), self.where)

    def _check_sizes(self, content: Any, path: Path) -> None:
        """ValueError if config.json has a size that no tensor has: its class would make lists and tables of that size."""
        largest = max(_LEAST_LIMIT, self._weights.largest())
        for name, value in content.items() if isinstance(content, dict) else ():
            most = _MOST_LAYERS if _LAYERS.fullmatch(name) else largest if _SIZE.fullmatch(name) else None
            if most is not None and isinstance(value, (int, float)) and value > most:
                raise ValueError(f"{path}: {name!r} is {value!r:.40}, and can be at most {most} with the tensors here")
            self._check_sizes(value, path)

    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        content = {name: special_floats(value) for name, value in self._config.items() if name not in KEYS}
        model_type = content.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{self.where}: transformers has no model_type {model_type!r:.80}")
        kind = CONFIG_MAPPING[model_type]
        real = {name: kind.attribute_map.get(name, name) for name in content}
        computed = {name for name, own in real.items() if isinstance(getattr(kind, own, None), property)}
        try:
            config = kind.from_dict({name: value for name, value in content.items() if name not in computed})
        except Exception as error:  # of any kind: the classes compute with the values
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.where}/config.json: {type(error).__name__}: {reason:.400}") from error
        config._name_or_path = self.where
        return config

    def tokenizer(self) -> Any:
        from transformers import AutoProcessor, AutoTokenizer

        errors = []
        for auto in (AutoProcessor, AutoTokenizer):
            try:
                return auto.from_pretrained(self.where, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # of any kind: the classes parse files of many layouts
                errors.append(error)
        reason = " ".join(str(errors[-1]).split())
        raise ValueError(f"{self.where}: no tokenizer can be made of its files: {reason:.400}") from errors[-1]

    def generation(self) -> dict[str, Any]:
        path = self._folder / "generation_config.json"
        content = read_json(path) if path.exists() else {}
        return {name: value for name, value in content.items() if not name.startswith(("_", "transformers_version"))}

    def weights(self, model: Any) -> Incoming:
        from .incoming import MlxIncoming

        return MlxIncoming(model, self._weights, self._layout, self.files, self._prefix)
