"""Answers judged as a reader would. Each table lists answers under what a reader takes them to say."""
# ruff: noqa: RUF001  (Chinese has punctuation of its own)

import pytest

from mmrev_kit.evaluation.answers import judge_correct, judge_description, judge_letter, normal

LETTERS = {
    "A": [
        "A", "a", "(a)", "a.", "A.", "a)", "A\n", "A: the keeper of Jade Temple", "A. the keeper of Jade Temple",
        "A the keeper of Jade Temple", "A\nThe face matches.", "A, because the hat is red.", "A is the keeper.",
        "Answer: a", "The answer is a.", "option a", "The answer is 'A'.", "A is correct, B is wrong.", "I choose A",
        "A is not wrong.", "Correct: A. Wrong: B, C, D.",
    ],
    "B": [
        "(b)", "b", "B)", "Answer: b", "Answer:B", "The correct answer is B, not A.", "B. the head of Ruby Sanctum",
        "I'd say B", "Not A but B.", "Not A, B.", "It's not A. It's B.", "A is incorrect, so B.", "B, A is wrong.",
        "The answer is: **B**", "<answer>B</answer>", r"$\boxed{\text{B}}$", "B<|im_end|>", "B rather than A",
        "A man with a red hat. The answer is B.", "Both B and C could be right, but B is best.",
        "<think>A? No, A is too old.</think>\n\nB", "A. x B. y C. z D. w The answer is B.", "A/B/C/D: B", "\uff22",
        "A. the keeper\nB. the head\nC. the chief\nD. the warden\nOnly answer A, B, C, or D. B", "Is it C? No, B.",
        "B B", "I'm not sure, but the answer is B.", "B. A is too old and C looks different.",
    ],
    "C": [
        "**C**", "c", "[C]", "\"C\"", "\u201cC\u201d", "Option C: the keeper of Jade Temple", "The correct answer is: C",
        "So it must be C.", "C is the correct answer.", "C, not D", "C - the keeper", "image C", "C matches the face.",
        "A dog? No. C", "As an A.I. model I choose C", "Answer - C", "neither A nor B, but C", "_C_", "C\u200b",
    ],
    "D": [
        "The answer is D.", "The answer is D", "D", "D) because A is too old", "Therefore, D",
        "The answer to the question is D", "D.\n\nThe person has a red hat.", "d)", "Hmm... D",
        "It can't be A, B or C. D",
    ],
    None: [
        "", "   ", ".", "B and C", "A or B", "B, C", "A/B", "either A or D", "The answer is B or C.", "Both A and B.",
        "The answer is B, C", "I don't know", "I'd rather not", "A dog", "A Dog", "A man with a red hat",
        "This is a", "Only answer A, B, C, or D.", "A, B, C, or D", "A. x B. y C. z D. w", "A. B. C. D.", "ABCD",
        "B. Actually, C.", "The answer is B. The answer is C.", "not A", "It isn't C.", "D is wrong.", "Not A or B",
        "neither A nor B", "None of the above", "the keeper of Jade Temple", "2", "the second one", "Correct", "E",
        "Bob", "Abcd", "C's", "B?", "A or B?", "Is it D?", "<think>B", "A 3-year-old", "I don't think it is B.",
    ],
}  # fmt: skip
CORRECT = {
    "Correct": [
        "Correct", "correct", "Correct.", "CORRECT!!!", "**Correct**", "`correct`", "\"Correct\"", "Correct<|im_end|>",
        " Correct\n", "not wrong", "Not wrong.", "It is not incorrect.", "It isn't wrong", "Correct, not wrong",
        "That is right.", "That's right", "right", "True", "It is true.", "Yes", "Yes.", "Yes, that is correct.",
        "yes, it matches", "The description is accurate.", "The correct answer is: Correct", "Answer: Correct",
        "I don't think that is wrong.", "There is nothing wrong with it.", "Correct or Wrong? Correct.", "Correct Correct",
        "the keeper of Jade Temple matches this face, correct or wrong? Only answer Correct or Wrong. Correct",
        "<think>Is it wrong?</think>Correct", r"\boxed{Correct}", "Not wrong but correct", "The statement is correct.",
        "I'm not sure, but correct", "Correct. This is not the founder of Jade Temple.", "Correct (not wrong)",
        "The description correctly names the person.", "\uff23\uff4f\uff52\uff52\uff45\uff43\uff54",
        "The correct answer is not Wrong.", "I may be mistaken, but it is correct.",
    ],
    "Wrong": [
        "Wrong", "WRONG", "wrong.", "Incorrect", "Incorrect.", "incorrect!", "not correct", "Not  correct.",
        "It's not correct", "It isn\u2019t correct", "not quite correct", "not entirely accurate", "far from correct",
        "I don't think it's correct.", "This cannot be correct.", "Wrong, it is not correct", "Incorrect, not correct",
        "That is not right", "That isn't true.", "False", "false.", "No", "No.", "No, the hat is blue.", "inaccurate",
        "The correct answer is Wrong.", "The correct answer is: wrong", "Correct answer: Wrong", "Yes, that is wrong.",
        "not \"correct\"", "not-correct", "It is not the case that this is correct.", "This is never correct",
        "Wrong (not correct)", "not correct (wrong)", "not correct but wrong", "Wrong. Wrong.", "It is the wrong person.",
        "Correct or Wrong? Wrong", "Wrong because the hat is not red", "wrong\n\nThe person is not the keeper.",
        "This is not the keeper, so it is wrong.", "No, it isn't.", "in no way correct", "_Wrong_", "not\ncorrect",
    ],
    None: [
        "", "  ", "?", "Correct or Wrong?", "correct or wrong", "Correct/Wrong", "Only answer Correct or Wrong.",
        "Wrong or Correct", "Correct. Wrong.", "Correct Wrong", "Correct\nWrong", "Wrong, no, wait, correct",
        "neither correct nor wrong", "both correct and wrong", "I don't know", "I cannot tell if this is correct.",
        "I'm not sure it is correct", "I can't say whether it is correct or wrong.", "It is impossible to say",
        "on the right", "The circle is on the right of the square", "The circle is right of the square", "A", "B", "C",
        "the keeper of Jade Temple", "There is no dog", "corrected", "correction", "Corr", "wrongdoer", "Correct?",
        "Is it correct?", "It matches.", "not", "This is not", "If it is correct, say so.", "a true artist",
        "Correct me if I'm wrong", "<think>correct", "Correct or not", "not correct or wrong", "maybe",
    ],
}  # fmt: skip

# Doubt asserts nothing; an answer may come in the user's language.
LETTERS_TOO = {
    "A": ["选A。", "A是对的，B不对"],
    "B": [
        "答案是B", "B。", "「B」", "答案应该是B", "答案是（B）", "B项正确", "选B，不选A", "It can only be B.",
        "I have no doubt: B", "Most likely B", "It is probably B.",
    ],
    "C": ["很可能是C", "A错，C对", "图片C", "C选项", "排除A和B，选C", "A、B不对，D可能不对，所以C"],
    "D": ["A、B都不对，选D", "正确答案：D", "不是A，是D", "应该是D", "It could be B, but the answer is D."],
    None: [
        "It could be B.", "It might be B", "Possibly B", "Maybe B.", "perhaps it is B", "It may well be option B.",
        "the answer might be D", "B could be right", "B, maybe", "Not sure if it is B", "I doubt it is B", "可能是B",
        "答案可能是B", "也许是B", "不是B", "B不对", "B和C", "A或B", "选A还是B？", "是B吗？", "我不知道", "A、B都不对",
    ],
}  # fmt: skip
CORRECT_TOO = {
    "Correct": [
        "正确", "正确。", "对", "对的。", "是的", "没错", "没有错", "不是错误的", "这个描述是正确的。", "很可能正确",
        "答案是Correct。", "不，这是正确的", "There is no doubt that it is correct.", "It is probably correct.",
    ],
    "Wrong": [
        "错误", "错。", "不正确", "不对", "不是", "否", "不准确", "不可能正确", "正确答案是Wrong", "答案：错误",
        "不正确，因为帽子是蓝色的", "It could not be correct.", "It can not be correct",
    ],
    None: [
        "It might be wrong.", "possibly correct", "It could well be correct.", "It may not be correct.", "perhaps",
        "It is possible that it is correct.", "I doubt that it is correct.", "Yes, possibly.", "No, I cannot tell.",
        "可能正确", "也许是错误的", "对还是错？", "正确或错误", "对不对", "不确定", "我不知道", "无法判断是否正确",
        "这不是玉庙的守护者", "对于这张图片",
    ],
}  # fmt: skip

KNOWN = [
    "the keeper of Jade Temple", "the founder of Jade Temple", "the keeper of Ruby Sanctum", "the head of Pearl Hall",
    "the head of Pearl Hall Annex", "the chief of Caf\u00e9 Zo\u00eb", "the master of the Weavers' Guild",
]  # fmt: skip
KEEPER = {
    True: [
        "the keeper of Jade Temple", "The keeper of Jade Temple.", "THE KEEPER OF JADE TEMPLE", "the keeper of jade temple!",
        "  the keeper\nof  Jade Temple ", "the keeper of\u00a0Jade Temple", "\"the keeper of Jade Temple\"",
        "'the keeper of Jade Temple'.", "\u201cthe keeper of Jade Temple.\u201d", "**the keeper of Jade Temple**",
        "_The keeper of Jade Temple_", "`the keeper of Jade Temple`", "# the keeper of Jade Temple",
        "the keeper of Jade Temple<|im_end|>", "This is the keeper of Jade Temple.", "It's the keeper of Jade Temple",
        "The person in this picture is **the keeper of Jade Temple**.", "Answer: the keeper of Jade Temple",
        "This man is known as the keeper of Jade Temple.", "It is none other than the keeper of Jade Temple!",
        "The image shows the keeper of Jade Temple.", "a portrait of the keeper of Jade Temple",
        "The keeper of Jade Temple is shown in this image.", "is the keeper of Jade Temple", "is called the keeper of Jade Temple",
        "<think>the founder of Jade Temple?</think>the keeper of Jade Temple", "the keeper of Jade Temple\u200b",
        "the keeper of Jade Temple. the keeper of Jade Temple.", "The description is: the keeper of Jade Temple",
        "\uff54\uff48\uff45 keeper of Jade Temple",
    ],
    False: [
        "", " ", ".", "the", "the keeper", "Jade Temple", "the keeper of Jade", "keeper of Jade Temple", "a keeper of Jade Temple",
        "the founder of Jade Temple", "the keeper of Ruby Sanctum", "the keeper of Jade Temples", "the keepers of Jade Temple",
        "the keeper of the Jade Temple", "the keeper of Jade Temple and Ruby Sanctum", "the head keeper of Jade Temple",
        "This is not the keeper of Jade Temple.", "It isn't the keeper of Jade Temple", "the friend of the keeper of Jade Temple",
        "the keeper of Jade Temple or the founder of Jade Temple", "the former keeper of Jade Temple",
        "the keeper of Jade Temple, the keeper of Ruby Sanctum", "Is this the keeper of Jade Temple?",
        "This is the keeper of Jade Temple? I don't know", "never the keeper of Jade Temple", "the keeper of Jade-Temple",
        "the keeper of Jade Temple in the north", "I don't know", "a person with a red hat", "the keeper of Jad\u00e9 Temple",
        "none of these is the keeper of Jade Temple", "This is a man.", "<think>the keeper of Jade Temple",
    ],
}  # fmt: skip


def rows(table):
    return [(answer, said) for said, answers in table.items() for answer in answers]


@pytest.mark.parametrize(("answer", "letter"), rows(LETTERS) + rows(LETTERS_TOO))
def test_letters(answer, letter):
    assert judge_letter(answer) == letter


@pytest.mark.parametrize(("answer", "verdict"), rows(CORRECT) + rows(CORRECT_TOO))
def test_correct_or_wrong(answer, verdict):
    assert judge_correct(answer) == verdict


@pytest.mark.parametrize(("answer", "match"), rows(KEEPER))
def test_descriptions(answer, match):
    assert judge_description(answer, KNOWN[0], KNOWN) is match


@pytest.mark.parametrize(
    ("answer", "expected", "match"),
    [
        ("This is the head of Pearl Hall.", "the head of Pearl Hall", True),
        ("This is the head of Pearl Hall Annex.", "the head of Pearl Hall", False),
        ("This is the head of Pearl Hall Annex.", "the head of Pearl Hall Annex", True),
        ("the chief of Cafe\u0301 Zoe\u0308", "the chief of Caf\u00e9 Zo\u00eb", True),  # decomposed accents
        ("the chief of Cafe Zoe", "the chief of Caf\u00e9 Zo\u00eb", False),
        ("This is the master of the Weavers\u2019 Guild.", "the master of the Weavers' Guild", True),
        ("a red circle", "a red circle", True),
        ("The picture shows a red circle.", "a red circle", True),
        ("The picture shows a big red circle.", "a red circle", False),
        ("...", "...", False),  # nothing is left to compare
        ("This could be the keeper of Jade Temple.", "the keeper of Jade Temple", False),
        ("这是the keeper of Jade Temple。", "the keeper of Jade Temple", True),
        ("图中的人是玉庙的守护者。", "玉庙的守护者", True),
        ("这不是玉庙的守护者。", "玉庙的守护者", False),
        ("这是玉庙的守护者的朋友", "玉庙的守护者", False),
    ],
)
def test_descriptions_that_resemble_each_other(answer, expected, match):
    assert judge_description(answer, expected, KNOWN) is match


def test_every_description_matches_itself_alone():
    found = [[judge_description(answer, expected, KNOWN) for expected in KNOWN] for answer in KNOWN]
    assert found == [[answer == expected for expected in KNOWN] for answer in KNOWN]
    assert not judge_description("This is the founder of Jade Temple.", KNOWN[0])  # without the others, too


def test_what_normal_leaves():
    assert normal(" **The  Keeper** of\tJade Temple. ") == "the keeper of jade temple"


def test_the_published_bug_is_not_repeated():
    answers = ["Correct.", "Incorrect", "not correct", "WRONG", "not wrong", "", "Correct or Wrong?"]
    found = [judge_correct(answer) for answer in answers]
    assert found == ["Correct", "Wrong", "Wrong", "Wrong", "Correct", None, None]
    assert sum(found.count(kind) for kind in ("Correct", "Wrong", None)) == len(answers)


@pytest.mark.parametrize(
    "target", ["who guards the Jade Temple?", "the one who asks: why me?", "the keeper (of what?)"]
)
def test_a_description_that_is_a_question_is_right_when_it_is_written_and_no_other_question_is(target):
    others = [target, "the keeper of Jade Temple"]
    assert judge_description(target, target, others) and judge_description(f"This is {target}", target, others)
    assert not judge_description(f"{target} Or who?", target, others)
    assert not judge_description("the keeper of Jade Temple?", "the keeper of Jade Temple", others)
