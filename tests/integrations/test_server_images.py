"""Images in conversations: what the model sees is what its processor makes of the picture, and nothing is opened."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, Server, chat_model, start

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
Image = pytest.importorskip("PIL.Image")

import isqtorch  # noqa: E402
from isqtorch.cli import main  # noqa: E402

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}assistant:"
)


def write_model(folder: Path) -> Path:
    """A LLaVA with random weights and the words of the demo model. Its template makes nothing of a plain text."""
    import transformers as hf

    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    seen = hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=seen,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config)
    model.lm_head.weight.data.normal_(std=0.3)
    model.model.multi_modal_projector.linear_2.weight.data.normal_(std=0.5)  # so that the picture decides the reply
    model.save_pretrained(folder)
    reader = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    hf.LlavaProcessor(
        image_processor=reader, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("server"), "--isq", "q8_0", "-m", str(folder), "--port", "0")
    yield running
    errors = running.end()
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return isqtorch.load(folder, "q8_0", progress=False)


def picture(seed: int, kind: str = "PNG") -> tuple[Any, str]:
    """A picture, and its data URL."""
    values = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    image, file = Image.fromarray(values.numpy()), io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return image, f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def parts(*urls: str, text: str = "What is this?") -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def expected(loaded: Any, images: list[Any], text: str = "What is this?") -> str:
    """What `generate` says about the pictures."""
    prompt = f"user: {'<image>' * len(images)}{text}\nassistant:"
    inputs = loaded.processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
    out = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    decoded: str = loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return decoded


def said(server: Server, messages: list[dict[str, Any]], **fields: Any) -> str:
    status, answer = server.ask(CHAT, {"messages": messages, "max_tokens": 12, "temperature": 0, **fields})
    assert status == 200, answer
    content: str = answer["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_model_sees_the_picture(kind: str, server: Server, loaded: Any) -> None:
    (one, first), (two, second) = picture(1, kind), picture(2, kind)
    answers = [expected(loaded, images) for images in ([one], [two], [one, two], [])]
    assert len(set(answers)) == 4
    asked = (parts(first), parts(second), parts(first, second), parts())
    assert [said(server, messages) for messages in asked] == answers


def test_the_openai_client(server: Server, loaded: Any) -> None:
    image, url = picture(1)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    settings = {"model": "default", "max_tokens": 12, "temperature": 0}
    stream = client.chat.completions.create(messages=parts(url), stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected(loaded, [image])
    detailed = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}, {"type": "text", "text": "Two?"}]
    several = client.chat.completions.create(messages=[{"role": "user", "content": detailed}], n=2, **settings)
    assert {choice.message.content for choice in several.choices} == {expected(loaded, [image], "Two?")}
    item = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What is this?"}]
    response = client.responses.create(
        model="default", input=[{"role": "user", "content": item}], max_output_tokens=12, temperature=0
    )
    assert response.output_text == expected(loaded, [image])
    status, counted = server.ask("/tokenize", {"messages": parts(url, text="Two?")})
    assert status == 200 and counted["count"] == several.usage.prompt_tokens > 16  # one for each patch of the picture
    assert server.ask("/v1/models")[1]["data"][0]["images"] is True


def test_text_alone_is_read_whole(
    server: Server, loaded: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain text, of which the template would make nothing, is a part of its own; also in `isqtorch run`."""
    answer = expected(loaded, [])
    assert said(server, [{"role": "user", "content": "What is this?"}]) == answer
    argv = [
        "-m",
        str(folder),
        "--isq",
        "q8_0",
        "--prompt",
        "What is this?",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
    ]
    assert main(["run", *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == answer


def bomb(side: int) -> str:
    """A PNG of 100 bytes with a picture of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    raw = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def damaged() -> str:
    """Half of a picture."""
    _, url = picture(3)
    start = url.index(",") + 1
    return url[: start + (len(url) - start) // 8 * 4]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/picture.png", "opens no addresses"),
        ("file:///etc/passwd", "opens no addresses"),
        ("/etc/passwd", "opens no addresses"),
        ("data:text/html;base64,AAAA", "must be a data URL"),
        ("data:image/png;base64,###", "not base64"),
        ("data:image/png;base64,AAAA", "no image in one of the formats"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='x'/>").decode(), "no image in one of the formats"),
        (bomb(5000), "5000 x 5000 pixels"),
        (bomb(12_000), "12000 x 12000 pixels"),  # of this size Pillow warns,
        (bomb(60_000), "decompression bomb"),  # and this one it does not open
        (damaged(), "damaged image"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_no_picture_is_told(url: str, message: str, server: Server) -> None:
    status, answer = server.ask(CHAT, {"messages": parts(url)})
    assert status == 400 and message in answer["error"]["message"], answer


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "image_url must be"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "image_url must be"),
        ({"type": "image_url", "image_url": {"url": picture(1)[1], "detail": "high"}}, "detail can be"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "'text' and 'image_url'"),
    ],
    ids=str,
)
def test_wrong_parts(part: dict[str, Any], message: str, server: Server) -> None:
    status, answer = server.ask(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert status == 400 and message in answer["error"]["message"], answer


def test_too_many_and_settings_of_the_processor(server: Server) -> None:
    _, url = picture(1)
    status, answer = server.ask(CHAT, {"messages": parts(*[url] * 17)})
    assert status == 400 and "17 images; a request can have 16" in answer["error"]["message"]
    huge = {"size": {"height": 50_000, "width": 50_000}, "crop_size": {"height": 50_000, "width": 50_000}}
    assert said(server, parts(url), chat_template_kwargs=huge) == said(server, parts(url))


def test_a_model_of_text_says_so(tmp_path: Path) -> None:
    running = start(tmp_path, "--isq", "4", "-m", str(chat_model(tmp_path)), "--port", "0")
    try:
        status, answer = running.ask(CHAT, {"messages": parts(picture(1)[1])})
        assert status == 400 and "'demo-chat' reads text only" in answer["error"]["message"]
        assert running.ask("/v1/models")[1]["data"][0]["images"] is False
    finally:
        assert "Traceback" not in running.end()
