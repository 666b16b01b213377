"""The path of docs/fine-tuning.md, as a user goes it: from a model's folder and a file of
conversations to a chat with the result.
"""

import json
import re
import subprocess

from PIL import Image

from places import REPOSITORY
from run_command import TIMEOUT_SECONDS, command, environment, run_chameleon
from tiny_model import tiny_checkpoint, tiny_tokenizer  # noqa: F401


def write_llava(folder):
    """Questions about pictures and requests for them, as LLaVA writes them."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(24):
        name = f"{number}.png"
        Image.new("RGB", (8, 10), (10 * number, 90, 40)).save(folder / "images" / name)
        ask = ("<image>\na handwritten digit", f"number {number}")
        human, gpt = ask if number % 2 else ("handwritten number", "<image>")
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
        records.append({"id": name, "image": name, "conversations": turns})
    (folder / "chats.json").write_text(json.dumps(records, indent=1))


def the_six_commands():
    """The words behind ``chameleon`` of the commands under the guide's first heading."""
    guide = (REPOSITORY / "docs" / "fine-tuning.md").read_text()
    section = guide.partition("## From a model's folder to a chat")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line.partition(" #")[0] for line in block.splitlines()]
    return [line.split()[1:] for line in lines]


def talk(*words):
    """What a chat says to one message from a pipe."""
    talking = subprocess.run(
        command("chat", *words),
        input="number 7\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT_SECONDS,
    )
    assert talking.returncode == 0, talking.stderr
    return talking.stderr


def test_six_commands_lead_from_a_folder_to_a_chat(tiny_checkpoint, tmp_path):  # noqa: F811
    commands = the_six_commands()
    verbs = ["preprocess", "inspect", "train", "report", "chat", "convert"]
    assert [words[0] for words in commands] == verbs
    run_chameleon("convert", tiny_checkpoint, tmp_path / "model", "--to", "hf")
    write_llava(tmp_path)
    config = (REPOSITORY / "examples" / "sft" / "chats.yaml").read_text()
    for name in ("tokens/", "runs/"):
        config = config.replace(f" {name}", f" {tmp_path}/{name}")
    (tmp_path / "chats.yaml").write_text(config)
    short = ["training.steps=2", "optimizer.lr_warmup_steps=1", "training.dtype=fp32"]
    places = {name: str(tmp_path / name) for name in ("chats.json", "model", "images", "tuned")}
    places["examples/sft/chats.yaml"] = str(tmp_path / "chats.yaml")
    said = {}
    for verb, *words in commands:
        words = [places.get(word, word) for word in words]
        words = [re.sub(r"^(tokens/|runs/|look\.html)", rf"{tmp_path}/\1", word) for word in words]
        if verb == "chat":
            said[verb] = talk(*words)
            continue
        said[verb] = run_chameleon(verb, *words, *(short if verb == "train" else [])).stdout
    assert "22 documents" in said["preprocess"] or "23 documents" in said["preprocess"]
    assert "the weights of" in said["train"] and "drawing requests" in said["train"]
    assert "text questions" in said["report"]
    assert "Messages are turns of a conversation" in said["chat"]
    words = ("--chat", "--prompt", "number 7", "--max-tokens", 4, "--output", tmp_path / "answers")
    run_chameleon("generate", tmp_path / "tuned", *words)
    exported = json.loads((tmp_path / "tuned" / "chameleon.json").read_text())
    assert exported["trained_on_conversations"] is True
