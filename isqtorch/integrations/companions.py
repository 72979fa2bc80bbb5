"""What belongs to a model beside its weights: tokenizer, processor, and small files that libraries look for."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hub import fetch, file_names

# transformers makes up a tokenizer of five tokens where none of these files is there.
_TOKENIZER = re.compile(
    r"tokenizer(?:_config)?\.json|tokenizer\.model(?:\.v\w+)?|tekken\.json|vocab\.(?:json|txt|bpe|model)|spiece\.model|"
    r"(?:sentencepiece\.bpe|spm|source|target)\.(?:model|spm)|prophetnet\.tokenizer|bpe\.codes"
)
_PROCESSOR = re.compile(r"(?:pre)?processor_config\.json|video_preprocessor_config\.json")
# Copied if neither the model nor the tokenizer nor the processor writes them.
_COPIED = re.compile(
    r"[\w-]+\.jinja|generation_config\.json|modules\.json|(?:config_)?sentence_\w+\.json|special_tokens_map\.json|"
    r"added_tokens\.json|normalizer\.json|merges\.txt"
)
_MODULES = "modules.json"  # of sentence-transformers: lists folders such as 1_Pooling
_MODULE = re.compile(r"\d+_\w+")


@dataclass(frozen=True)
class Companions:
    """The tokenizer and the processor of a model; None: it has none.

    Attributes:
        tokenizer: the text tokenizer, also that of the processor.
        processor: for images or sound; None for models of text.
        why: the reason why there is no tokenizer, if there might be one.
    """

    tokenizer: Any = None
    processor: Any = None
    why: str = ""

    @classmethod
    def load(cls, source: str, *, local: bool, trust_remote_code: bool) -> Companions:
        """Load what the model has files for.

        Raises:
            ValueError: the files of the tokenizer are damaged.
            OSError: the Hub cannot be reached.
        """
        from transformers import AutoProcessor, PreTrainedTokenizerBase

        names = file_names(source, local=local)
        options = {"trust_remote_code": trust_remote_code, "local_files_only": local}
        has_tokenizer = any(_TOKENIZER.fullmatch(name) for name in names)
        tokenizer = processor = None
        if any(_PROCESSOR.fullmatch(name) for name in names):
            try:
                processor = AutoProcessor.from_pretrained(source, **options)
                if not has_tokenizer and getattr(processor, "tokenizer", None) is not None:
                    processor = None
                    raise OSError("there are no files of its tokenizer")
            except Exception as error:  # of any kind: packages that are missing, files of another version
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"the processor of {source} does not load ({why:.300}): it runs on text alone; the files are kept",
                    stacklevel=2,
                )
            if isinstance(processor, PreTrainedTokenizerBase):
                tokenizer, processor = processor, None
            tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        if tokenizer is None and has_tokenizer:
            tokenizer = _tokenizer(source, options)
        return cls(tokenizer, processor)

    def save(self, folder: Path) -> None:
        """Write them as transformers does."""
        writer = self.processor or self.tokenizer
        if writer is not None:
            writer.save_pretrained(folder)
        if self.tokenizer is not None and not any(_TOKENIZER.fullmatch(path.name) for path in folder.iterdir()):
            self.tokenizer.save_pretrained(folder)


def _tokenizer(source: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer of a model; None for one that knows no word. Many classes of transformers make such a one of nothing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise anything
        if (
            isinstance(error, ImportError)
            or not Path(source).expanduser().is_dir()
            or "trust_remote_code" in str(error)
        ):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"the tokenizer in {source} cannot be loaded ({type(error).__name__}: {reason:.300}). Copy its files again from the "
            "original model."
        ) from error
    known = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    return tokenizer if known else None


def copy_files(source: str, folder: Path, *, local: bool) -> None:
    """Copy the small files of a model that nobody has written into its new folder.

    Args:
        source: the folder or id of the model.
        folder: the new folder.
        local: do not use the network.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = file_names(source, local=local)
    wanted = [name for name in names if any(kind.fullmatch(name) for kind in (_COPIED, _PROCESSOR, _TOKENIZER))]
    if _MODULES in names:
        wanted += [name for name in names if is_module(name.partition("/")[0]) and name.count("/") == 1]
    for name in wanted:
        target = folder / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(fetch(source, name, local=local), target)


def is_module(name: str) -> bool:
    """Whether a name can be a folder of a sentence-transformers model, such as 1_Pooling."""
    return _MODULE.fullmatch(name) is not None
