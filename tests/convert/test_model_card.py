"""The card of a converted folder, whatever its folder is called."""

import ast
import re

import pytest
import yaml

from qartsr_pipeline.convert.model_card import Card, license_of, markdown_text, yaml_text

NAMES = [
    "osediff",
    "http://a.b and www.c.d @someone $x$",
    "mountain \U0001f3d4 \u00e9t\u00e9",
    'say "cheese"',
    "<script>*bold*_x_</script>",
    "[a](b) # `c` | d\\e",
    "C:\\models\\new",
    "# not\na heading",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_any_name_as_it_is(name, tmp_path):
    text = Card(name, "Origin.", "openrail++", 'owner/odd: "name"', takes_prompts=False, timestep=999, scale=4).text()
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "openrail++" and fields["base_model"] == 'owner/odd: "name"'
    assert ast.literal_eval(re.search(r"from_pretrained\((.*)\)\n", body)[1]) == name
    heading = body.splitlines()[0]
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", heading) == f"# {' '.join(name.split())}"
    assert not re.search(r"(?<!\\)[<>*_`\[\]|]", heading), "nothing in the heading is markup"
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path / "README.md") == "openrail++"


def test_text_without_markup_is_left_as_it_is():
    assert markdown_text("photos-w4a4 v1.2, 4 x") == "photos-w4a4 v1.2, 4 x"


@pytest.mark.parametrize("name", ["\udcff.png", "turned \u202e gnp", "bell\x07 \x7f", "\x00"])
def test_what_cannot_be_shown_or_stored_is_replaced(name, tmp_path):
    """File names that are no UTF-8 (half characters in Python), and characters that hide or turn others."""
    text = Card(name, "Origin.", "other", f"owner/{name}", takes_prompts=False, timestep=1, scale=4).text()
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert text.isprintable() or all(letter == "\n" or letter.isprintable() for letter in text)
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"].startswith("owner/")
    assert ast.literal_eval(re.search(r"from_pretrained\((.*)\)\n", body)[1]) == name


@pytest.mark.parametrize("text", ["mit", "no", "1.0", "a: b", "- x", "owner/name", ""])
def test_a_value_of_the_header_is_read_as_text(text):
    assert yaml.safe_load(f"license: {yaml_text(text)}") == {"license": text}


def test_a_licence_is_read_from_a_header_alone(tmp_path):
    for content, expected in (
        ("---\ntags:\n- x\nlicense: 'mit'\n---\nlicense: other", "mit"),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("# A card\nlicense: mit", None),
    ):
        (tmp_path / "README.md").write_text(content)
        assert license_of(tmp_path / "README.md") == expected
    assert license_of(tmp_path / "none.md") is None
