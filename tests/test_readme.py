"""What README and docs/reference.md show works as shown, and is all there is."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

import ds_horovod
from ds_horovod import Compressor, DoubleSqueeze
from ds_horovod.in_process import Simulation
from ds_horovod.layout import pack
from ds_horovod.options import Options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", REFERENCE, re.DOTALL)


def rows(heading):
    """The cells of the table of a section, without the code marks around the first."""
    section = REFERENCE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_the_reference_has_every_option_with_its_default():
    listed = rows("Options")
    declared = {f.name: f.default for f in fields(Options)}
    assert list(listed) == list(declared) and MISSING not in declared.values()
    for name, default in declared.items():
        shown = eval(listed[name][0].strip("`"), dict(vars(ds_horovod)))
        assert shown == default and isinstance(shown, bool) == isinstance(default, bool), name
    documented = inspect.getdoc(DoubleSqueeze)
    for name in declared:
        assert re.search(rf"^(\w+, )*{name}(, \w+)*$", documented, re.MULTILINE), f"help(DoubleSqueeze) says nothing of {name}"


def test_the_reference_has_every_compressor_with_its_arguments():
    listed = rows("Compressors")
    public = [vars(ds_horovod)[name] for name in ds_horovod.__all__ if name in vars(ds_horovod)]  # what needs no Horovod
    public = [value for value in public if inspect.isclass(value) and issubclass(value, Compressor) and value is not Compressor]
    assert sorted(call.partition("(")[0] for call in listed) == sorted(each.__name__ for each in public)
    for call in listed:
        kind = getattr(ds_horovod, call.partition("(")[0])
        assert re.findall(r"(\w+)=", call) == list(inspect.signature(kind).parameters)
        assert repr(eval(call, dict(vars(ds_horovod)))) == repr(kind())


def test_the_reference_has_every_method():
    listed = rows("Methods")
    public = {n for n in vars(DoubleSqueeze) if not n.startswith("_")} - {"compress", "decompress"}  # which raise what to call
    assert {call.partition("(")[0] for call in listed} == public
    for call in listed:
        name, paren, arguments = call.rstrip(")").partition("(")
        if paren:
            shown = inspect.signature(eval(f"lambda {arguments}: 0")).parameters.values()
            expected = inspect.signature(getattr(DoubleSqueeze, name)).parameters.values()
            assert [(p.name, p.default) for p in shown] == [(p.name, p.default) for p in expected if p.name != "self"], name


def test_the_readme_is_short():
    assert README[: README.index("\n## More")].count("\n") <= 150


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


def test_commands_name_what_exists():
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    targets = set(re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE))
    assert {"train", "test", "wheel"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"(?:examples|benchmarks|scripts)/\w[\w/.-]*\w", README):
        assert list(ROOT.glob(path.rstrip("."))) or "*" in path or list(ROOT.glob(f"{path}*")), path
    for extra in re.findall(r"`\.\[(\w+)\]`", README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(re.findall(r"\(examples/(\w+\.py)\)", README))


def test_methods_that_the_readme_calls_exist():
    called = set(re.findall(r"double_squeeze\.(\w+)\(", README)) | {"broadcast_state"}
    assert len(called) > 4 and all(callable(getattr(DoubleSqueeze, name)) for name in called)


def test_options_can_be_constructed():
    (block,) = [block for block in BLOCKS if "server_compressor=NoCompression()" in block]
    lines = [line for line in block.splitlines() if line]
    assert sum(line.startswith("compression = ") for line in lines) == len(lines) - 1 >= 6
    namespace = {}
    exec(lines[0], namespace)
    for line in lines[1:]:
        exec(line, namespace)


def test_own_compressor_obeys_the_conservation_law():
    (block,) = [block for block in BLOCKS if "class EightBit" in block]
    namespace = {}
    exec(block, namespace)
    compressor = namespace["compression"].options.compressor
    layout = pack([70, 333], compressor.block, 3)
    simulation = Simulation(layout, Options(compressor), workers=3)
    torch.manual_seed(0)
    total, moved = 0.0, 0.0
    for _ in range(20):
        gradients = [[torch.randn(70), torch.randn(333)] for _ in range(3)]
        total = total + sum(torch.cat(g).double() for g in gradients) / 3
        simulation.step(gradients)
        assert all(torch.equal(torch.cat(g), torch.cat(gradients[0])) for g in gradients)
        moved = moved + torch.cat(gradients[0]).double()
    kept = sum(exchange.worker_error.double() for exchange in simulation.exchanges) / 3
    kept = kept + torch.cat([exchange.server_error for exchange in simulation.exchanges]).double()
    kept = torch.cat([kept[o : o + n] for o, n in zip(layout.offsets, layout.numels, strict=True)])
    assert kept.abs().max() > 0
    torch.testing.assert_close(total, moved + kept, rtol=0, atol=1e-5)
