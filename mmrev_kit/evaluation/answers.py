"""What a model's answer says, judged as a reader would: a letter, Correct or Wrong, or a description.

None means that a reader could not tell: the answer is empty, names two options, asks back, repeats the question, or
says that it does not know. Such an answer is unparsed and counts as a miss. A question asserts nothing, so "B?" is no
answer; one that is taken back ("B. No, C.") is none either. Doubt asserts nothing: what could, may or might be, what is
possible, perhaps or maybe so; what is probably or likely so is asserted. An answer may come in Chinese, whatever the
question's language.
"""

import re
from collections.abc import Iterable

from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.tasks import CW, GENERATION
from mmrev_kit.data.texts import THOUGHT, normal, visible

QUESTION = re.compile(r"[^.!?\n]*\?+[\"')\]]*")

# "A" before any word but these is the article of "A dog".
WORDS: dict[str, list[str]] = read_asset("answers")
AFTER_LETTER_A = WORDS["after_letter_a"]
_CHINESE = r"\u3400-\u9fff"  # written without spaces: no border of a word is seen between its characters
_W = rf"[^\W{_CHINESE}]"
LETTER = (
    rf"(?<!{_W})(?<!{_W}')(?<!{_W}-)(?<!\b[A-Za-z]\.)"  # no part of a word, of "I'd", of "X-A" or of "U.A."
    rf"(?:[Aa](?!\s+(?!(?i:{'|'.join(AFTER_LETTER_A)})\b){_W})|[B-Db-d])"
    rf"(?!{_W})(?!'{_W})(?!-{_W})(?!\.[A-Za-z]\b)"
)
ITEM = (
    r"(?:(?i:option|choice|image|picture|letter)\s+|(?:选项|图片|图)\s*)?"
    rf"[(\[\"'<{{]*{LETTER}[)\]\"'>}}]*(?:\s*(?:选项|项))?"
)
_AND = r"(?:/|&|\b(?i:or maybe|or|and|nor)\b|[、和或与及]|或者|还是|以及)"
JOINED = rf"{ITEM}(?:\s*,\s*{ITEM})*(?:\s*,?\s*{_AND}\s*{ITEM})+"
MENTION = re.compile(rf"{JOINED}|{ITEM}")
_FILLER = (
    r"(?:(?:be|been|is|it|it's|that|this|think|believe|say|choose|pick|the|answer|option|choice|letter|image|picture|"
    r"correct|right|likely|most|necessarily|either|clearly|definitely|probably|just|actually|simply|still|indeed|"
    r"if|whether|well)\s+)*"
)
_OPEN = r"[(\[\"'<{\s]*$"
_BE = r"(?:is|are|was|be|looks?|seems?|must be|might be|may be|could be|should be|would be|will be)"
REJECTED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|except|excluding|rather than|instead of|other than|anything but)|n't)\s+"
    rf"{_FILLER}{_OPEN}|\b(?:wrong|incorrect)\s*(?:answers?\s*)?:{_OPEN}"
    rf"|(?:不(?:是|选|可能是|应该?是|应该?选)|不会是|并非|而非|排除|除了)\s*{_OPEN}",
    re.IGNORECASE,
)
REJECTED_AFTER = re.compile(
    r"[.]?\s*(?:(?:is|are|was|were|does|do|did|can|could|would|must|should|has)(?:n't|\s*not|'t|\s+never)\b"
    rf"(?!\s+(?:wrong|incorrect))|{_BE}\s+(?:(?!not\b)\w+\s+)?(?:wrong|incorrect|false|impossible|ruled out)\b"
    r"|\s*[:=(-]\s*(?:wrong|incorrect|false|no)\b"
    r"|\s*(?:[都也均全并]*(?:是|为)?(?:不(?:对|是|正确|符|匹配|可能)|错|并非)))",
    re.IGNORECASE,
)
_MAY = r"(?:could|may|might|can)(?:\s+(?:well|also|even|possibly|perhaps))*"
DOUBTED_BEFORE = re.compile(
    rf"(?:\b(?:{_MAY}|possibly|perhaps|maybe|(?:not|n't)\s+(?:entirely\s+)?(?:sure|certain)|unsure|uncertain"
    rf"|(?<!no )doubt)\s+{_FILLER}|(?:(?<![很最])可能(?:会?是|为)?|也许是?|或许是?|大概是?|好像是?|似乎是?)\s*){_OPEN}",
    re.IGNORECASE,
)
DOUBTED_AFTER = re.compile(
    rf"[.]?\s*(?:{_MAY}\s+be\b|(?:is|are|seems?|looks?)\s+(?:also\s+|an?\s+)?(?:possible|possibility|plausible)\b"
    r"|[,(-]?\s*(?:possibly|perhaps|maybe)\b|(?<![很最])可能|也许|或许)",
    re.IGNORECASE,
)
ASSERTED_BEFORE = re.compile(
    r"(?:\b(?:answer|solution|choice|pick|selection|response|option|letter|match|correct)s?\b"
    rf"(?:\s+(?:to|for)(?:\s+\w+){{1,4}}?|\s+here)?\s*(?:{_BE}\s*:?|:|=|-+>?)"
    r"|\b(?:choose|chose|pick|select|go with|going with|answer|answer with)\s"
    rf"|\b(?:so|therefore|thus|hence)\b[,:]?(?:\s+it(?:'s|\s+{_BE}))?)\s*{_FILLER}{_OPEN}"
    rf"|(?:答案(?:应该?|就)?(?:是|为|选|:)?|选择?|因此|所以|故)(?:是|为|:)?\s*{_OPEN}",
    re.IGNORECASE,
)
_SURELY = r"(?:is|are|was|were|looks?|seems?|must be|should be|would be|will be)"  # "could be right" asserts nothing
ASSERTED_AFTER = re.compile(
    rf"[.]?\s*(?:{_SURELY}\s+(?:\w+ly\s+)?(?:the\s+)?(?:(?:only|best|most likely)\s+)?"
    r"(?:correct|right|true|best|answer|match|not\s+(?:wrong|incorrect))\b|\s*[:=(-]\s*(?:correct|right|true|yes)\b"
    r"|\s*(?:是|才是|为)?(?:最)?(?:正确|对的|对$|没错)|\s*(?:才?是|为)(?:正确)?答案)",
    re.IGNORECASE,
)
GIVES_REASON = re.compile(r"[.,:]*\s*(?:because|since|as|for)\b", re.IGNORECASE)
DISCUSSED_AFTER = re.compile(
    rf"[.]?\s+(?:{_BE}|has|have|does|do|shows?|depicts|appears|matches|fits|represents|portrays|features)\b",
    re.IGNORECASE,
)


def _standing(text: str, mention: re.Match) -> str:
    """How a mention of letters stands in the text: rejected, doubted, asserted, discussed or plain."""
    before, after = text[: mention.start()], text[mention.end() :]
    if REJECTED_BEFORE.search(before) or REJECTED_AFTER.match(after):
        return "rejected"
    if DOUBTED_BEFORE.search(before) or DOUBTED_AFTER.match(after):
        return "doubted"
    if ASSERTED_BEFORE.search(before) or ASSERTED_AFTER.match(after):
        return "asserted"
    if not before.strip() and GIVES_REASON.match(after):
        return "asserted"
    return "discussed" if DISCUSSED_AFTER.match(after) else "plain"


def _letters_by_standing(text: str) -> dict[str, list[str]]:
    """{standing: sets of letters as text, such as "B" or "BC"}, in reading order."""
    found: dict[str, list[str]] = {"asserted": [], "plain": [], "discussed": [], "rejected": [], "doubted": []}
    previous, end = "", 0
    for mention in MENTION.finditer(text):
        letters = "".join(sorted({letter.upper() for letter in re.findall(LETTER, mention.group())}))
        standing = _standing(text, mention)
        unfinished = mention.group() == "a" == text[mention.start() :]  # "The picture shows a" was cut off
        if letters == "ABCD" or (unfinished and standing != "asserted" and text != "a"):
            continue  # the list of all options is the question's
        if standing == "plain" and previous == "asserted" and text[end : mention.start()].strip() == ",":
            standing = "asserted"  # "the answer is B, C"
        found[standing].append(letters)
        previous, end = standing, mention.end()
    return found


def judge_letter(text: str) -> str | None:
    """The one option that the answer chooses, "A" to "D", or None.

    A letter counts as a word of its own, in either case, bare or dressed: "b", "(B)", "**C**", "Option C: the keeper".
    What is said outright ("the answer is", "is correct", "so", "I choose") outweighs letters that are only mentioned,
    which outweigh letters spoken about ("D) because A is too old" is D); rejected letters ("not A", "A is wrong")
    and doubted ones ("it could be A") never count. Two letters of the same standing are no answer. "A" before a noun
    is an article; the options repeated as a list A., B., C., D. are the question's. A description without its letter,
    "the second one" and "2" are not read as letters.
    """
    plain = QUESTION.sub(" ", visible(text))
    plain = re.sub(r"\s*\n\s*", " \n", plain).strip()
    found = _letters_by_standing(plain)
    if not found["asserted"]:
        found["plain"] = re.sub("A B C D ?", "", " ".join(found["plain"])).split()
    for standing in ("asserted", "plain", "discussed"):
        letters = set("".join(found[standing]))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def judge_answer(form: str, answer: str, expected: str, options: Iterable[str]) -> tuple[str | None, bool]:
    """What an answer to a question of this format (`data.tasks`) says, None where it is unparsed, and whether it is
    right. Only what comes after a thought counts."""
    answer = THOUGHT.sub("", answer)
    if form == GENERATION:
        right = judge_description(answer, expected, options)
        return (expected if right else answer.strip() or None), right
    read = (judge_correct if form == CW else judge_letter)(answer)
    return read, read == expected


POSITIVE, NEGATIVE = (
    rf"(?<!{_W})(?:correct|correctly|accurate|accurately)(?!{_W})|正确|准确|没错|对(?=的?$)",
    rf"(?<!{_W})(?:wrong|wrongly|incorrect|incorrectly|inaccurate|false|untrue)(?!{_W})|(?<!没)错误?",
)
_TRUE, _FALSE = rf"(?:{POSITIVE}|\b(?:right|true)\b|对)", rf"(?:{NEGATIVE})"
_OR = r"\s*(?:\bor\b|\bnor\b|\band\b|/|或者?|还是|和|与)\s*"
BOTH = re.compile(rf"{_TRUE}{_OR}{_FALSE}|{_FALSE}{_OR}{_TRUE}|(?:{POSITIVE}) or not\b|对不对|正确与否")
NAMED = re.compile(
    r"\b(?:correct|right|true) (?:(?:answer|option|choice|response|verdict|label)\s*:|"
    r"(?:answer|option|choice|response|verdict|label|one|description|identity|name|statement)(?: \w+){0,4}? "
    r"(?:is|was|would be|should be)\b)|\bcorrect me\b"
    r"|正确的?(?:答案|选项|描述)(?:应该?)?(?:是|为|:)?"
)
CLAUSE = re.compile(
    r"[.,;:!()\u2013\u2014、]|\s-+\s|\b(?:but|so|because|since|and|therefore|thus|hence|although|though|while)\b"
    r"|但是?|所以|因为|因此|而且"
)
UNSURE = re.compile(
    r"(?:\bnot|n't|\bcannot) (?:\w+ )?(?:sure|certain|clear|know|tell|say|determine|judge|verify|possible)\b"
    r"|\b(?:unsure|uncertain|unable|impossible|possible|possibly|perhaps|maybe)\b|(?<!no )(?<!without )\bdoubt"
    r"|\b(?:may|might|could|can)(?: (?!not|never)\w+)? be\b|\b(?:may|might) (?:not|well)\b"
    r"|(?<![很最不])可能|也许|或许|大概|似乎|好像|不确定|不清楚|不知道|无法|难以|不能(?:确定|判断)"
)
CONDITION = re.compile(r"\b(?:if|whether|unless)\b.*")
NEGATION = re.compile(
    r"n't\b|\bisnt\b|\b(?:not|never|cannot|hardly|neither|nor|nothing|far from|no longer|in no way|by no means|"
    r"anything but)\b|不|并非|没有?(?!错)|未"
)
VERDICT = re.compile(rf"(?P<positive>{POSITIVE})|(?P<negative>{NEGATIVE})")
# "right" and "true" only as what something is said to be: not "on the right", not "a true artist".
PREDICATE = re.compile(
    r"(?:^|(?<=\bis )|(?<=\bare )|(?<=\bbe )|(?<='s )|(?<='re )|(?<=n't )|(?<=\bnot )|(?<=ly )|(?<=\bquite ))"
    r"(?P<positive>right|true)$"
)
YES = re.compile(r"\W*(?:(?:yes|yeah|yep)\b|是(?:的|[,.!]|$))")
NO = re.compile(r"\W*(?:(?:no|nope)(?:\W*$|\s*[,.!;:\u2014-]|\s+(?:it|this|that|he|she)\b)|否|不(?:是的?)?(?:[,.!]|$))")


def _verdicts(clause: str) -> set[str]:
    """What one clause asserts. A negation turns the first verdict after it."""
    if UNSURE.search(clause):
        return set()
    clause = CONDITION.sub("", clause).strip()
    found, start = set(), 0
    for match in sorted([*VERDICT.finditer(clause), *PREDICATE.finditer(clause)], key=re.Match.start):
        negations = len(NEGATION.findall(clause[start : match.start()]))
        found.add("Correct" if (match.lastgroup == "positive") == (negations % 2 == 0) else "Wrong")
        start = match.end()
    return found


def judge_correct(text: str) -> str | None:
    """ "Correct", "Wrong", or None where the answer asserts neither or both.

    Negations are read within their clause: "not correct" and "I don't think it's correct" are Wrong, "not wrong" is
    Correct. "Accurate", "inaccurate" and "false" count like the asked-for words, and so do "right" and "true" as what
    something is said to be ("That is right"). Yes and no at the start decide only where none of these words does. The
    question repeated, "the correct answer is ...", conditions ("if it is correct") and doubt ("not sure it is
    correct", "it might be correct") assert nothing, nor does "it matches": the model was asked for a word.
    """
    plain = re.sub(r"\s*\n\s*\n\s*", ". ", visible(text).casefold())
    plain = " ".join(QUESTION.sub(" ", plain.replace('"', " ")).split())
    plain = NAMED.sub(" ", BOTH.sub(" ", re.sub(r"(?<!\w)'|'(?!\w)", " ", plain)))
    plain = " ".join(plain.split())
    found = set().union(*(_verdicts(clause) for clause in CLAUSE.split(plain)))
    if not found and not UNSURE.search(plain):
        found = ({"Correct"} if YES.match(plain) else set()) | ({"Wrong"} if NO.match(plain) else set())
    return found.pop() if len(found) == 1 else None


# Words that say nothing about who it is: "The person in this picture is none other than ...".
FRAME = frozenset(WORDS["frame"])


def judge_description(text: str, expected: str, others: Iterable[str] = ()) -> bool:
    """Whether the answer is the expected description.

    It is when both are equal after `normal`, or when the answer is a sentence that adds nothing to it, such as "This
    is the keeper of Jade Temple.": of all known descriptions exactly the expected one occurs as whole words (a
    longer known description is not also the shorter ones inside it), and every other word is one that says nothing
    about who it is (`FRAME`). So a partial description, one with additions, a negated, related ("the friend of the
    keeper ...") or second one, and a question are no match. A leading article belongs to the description: "keeper of
    Jade Temple" is partial.

    Args:
        text: what the model wrote.
        expected: the description of the row's entity.
        others: the experiment's descriptions; the expected one may be among them.
    """
    answer, target = normal(text), normal(expected)
    if not answer or not target:
        return False
    if answer == target:  # also where it ends in a question mark of its own
        return True
    rest, found = answer.replace("none other than", " "), set()
    for known in sorted({target, *map(normal, others)} - {""}, key=len, reverse=True):
        rest, count = re.subn(rf"(?<!{_W}){re.escape(known)}(?!{_W})", " \u2022 ", rest)
        if count:
            found.add(known)
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", rest)
    return found == {target} and "?" not in rest and all(word in FRAME for word in words)
