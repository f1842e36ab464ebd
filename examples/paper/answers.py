"""Final answers, found in a model's output or a data set's solution and brought into a form in which equal ones are equal.

GSM8K: a number; MATH: LaTeX, normalised as text, with decimals and fractions of integers as fractions in lowest terms;
commonsense: the name of a choice.
"""
import re
from fractions import Fraction

_SOMETHING = r"(?=\s*[^\s:])"  # behind a marker, which an output that was cut off may end in
_MARKER = re.compile(rf"(?:the (?:final )?answer is:?|####){_SOMETHING}", re.IGNORECASE)
_COLON_MARKER = re.compile(rf"the (?:final )?answer is:{_SOMETHING}", re.IGNORECASE)
_END = re.compile(r"\.\s+[A-Z]|\n(?!.*\\end\{)", re.DOTALL)  # of an answer after a marker: a new sentence, or a line
_LONGEST = 1000  # characters of an answer
_NUMBER = re.compile(r"(-?)\$?(-?)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?)(?:/([1-9]\d*))?")
_LAYOUT = "left|right|[bB]igg?[lr]?|displaystyle|q?quad"
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
_UNIT = r"\\(?:text(?:rm|normal)?|mbox|mathrm)\s*\{[^{}]*\}"
_CLOCK = r"(?<![a-z])[ap]\.?\s*m\b"
_TERM = r"\d*\\sqrt\{[^{}]*\}|\d*\\pi|\d+"


def find_answer(schema: str, output: str, answer: str) -> str | None:
    """The final answer of an output, in the form of the right answer, which it may equal; None if there is none.

    Args:
        schema: Of the question's data set: "gsm8k", "math" or "commonsense".
        output: What the model wrote.
        answer: The right answer, as data.example gives it.
    """
    if schema == "commonsense":
        return find_choice(output, answer)
    return find_number(output) if schema == "gsm8k" else find_latex(output)


def find_number(text: str) -> str | None:
    """The first number after the last "The answer is" or "####", as an integer or a fraction in lowest terms; None without one.

    Thousands' commas, a dollar sign, units and a full stop do not count.
    """
    text = _after_last(_MARKER, text)
    if text is None:
        return None
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text[:_LONGEST].replace("\u2212", "-").replace("\\$", "$"))
    for minus, other_minus, digits, divisor in _NUMBER.findall(text):
        if digits:
            value = Fraction(digits.replace(",", "")) / int(divisor or 1)
            return str(-value if minus or other_minus else value)
    return None


def find_latex(text: str) -> str | None:
    """The final answer, normalised: what follows the last "The answer is:", or else the content of the last \\boxed{}, or else
    what follows the last "the answer is"; None if there is nothing of the kind.
    """
    marked = _after_last(_COLON_MARKER, text)
    content = boxed(text if marked is None else marked)
    if content is None:
        marked = _after_last(_MARKER, text)
        content = None if marked is None else _END.split(marked, maxsplit=1)[0]
    if content is None:
        return None
    return normalise(content[:_LONGEST]) or None


def find_choice(text: str, answer: str) -> str | None:
    """The first of "true" and "false", or of the names with a number such as "answer2", whichever sort the right answer is."""
    name = answer.rstrip("0123456789")
    names = r"true|false" if name == answer else rf"{re.escape(name)}\d+"
    found = re.search(rf"\b(?:{names})\b", text, re.IGNORECASE)
    return found[0].lower() if found else None


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...}, in which braces may be nested, or of "\\boxed 5"; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\(?:boxed|fbox)\s*", "", text[start:])
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position]
    return None


def normalise(latex: str) -> str:
    """LaTeX of a final answer without what does not change its value: spacing, sizes, units, "x =", ways to write a fraction."""
    text = latex.strip().replace("\u2212", "-").replace("\u00b0", "")
    text = re.sub(r"^\\[(\[](.*)\\[)\]]\.?$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"(?<=\d)(?:,\s*\\!|\{,\})\s*(?=\d{3})", "", text)
    text = re.sub(rf"(?<!\\)\\(?:[!,;: ]|(?:{_LAYOUT})(?![a-zA-Z]))|~", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\?[$%]", "", text).strip().rstrip(".").rstrip()
    text = _without_units(text)
    text = re.sub(r",?\s*\b(?:and|or)\b\s*", ",", re.sub(_TEXT, r" \1 ", text))
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?(?:=|\\in(?![a-z]))", "", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    text = re.sub(r"\\begin\{[bB]matrix\}(.*?)\\end\{[bB]matrix\}", r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return _with_lowest_terms(_with_braces(text))


def _after_last(marker: re.Pattern, text: str) -> str | None:
    """What follows the last occurrence of a marker; None without one."""
    ends = [found.end() for found in marker.finditer(text)]
    return text[ends[-1]:].strip() if ends else None


def _without_units(text: str) -> str:
    """Without words, and a power of them, behind a quantity; "a.m." and "p.m." stay."""
    if re.search(_CLOCK, text, re.IGNORECASE):
        return text
    words = rf"(?:\s*{_UNIT}|(?<=[\d}}])\s+[A-Za-z]{{2,}}(?:\s+[A-Za-z]{{2,}})*)(?:\^(?:\d|\{{\d\}}))?\.?$"
    quantity = re.sub(words, "", text)
    return quantity if re.search(r"\d", quantity) else text


def _with_braces(text: str) -> str:
    """\\dfrac12 and \\sqrt2 as \\frac{1}{2} and \\sqrt{2}; 1/2 and \\sqrt{3}/2 as fractions."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\w)", r"\\frac{\1}", text)
    text = re.sub(rf"(\\frac{_GROUP})(\w)", r"\1{\2}", text)
    return re.sub(rf"(?<![\w).])({_TERM})/({_TERM})(?![\w({{.]|\\(?!\\|end))", r"\\frac{\1}{\2}", text)


def _with_lowest_terms(text: str) -> str:
    """Decimals, mixed numbers and fractions of integers as fractions in lowest terms."""
    text = re.sub(r"(?<![\d.])\d*\.\d+(?![\d._])", lambda found: _fraction(Fraction(found[0])), text)
    text = re.sub(r"(?<![\w.}^])(\d+)\\frac\{(\d+)\}\{(\d+)\}", _mixed, text)
    return re.sub(r"\\frac\{(-?\d+)\}\{(\d*[1-9]\d*)\}", lambda found: _fraction(Fraction(int(found[1]), int(found[2]))), text)


def _mixed(found: re.Match) -> str:
    whole, numerator, denominator = (int(part) for part in found.groups())
    return _fraction(whole + Fraction(numerator, denominator)) if 0 < numerator < denominator else found[0]


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value)
    return ("-" if value < 0 else "") + rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
