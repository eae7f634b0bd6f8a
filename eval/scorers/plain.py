"""What a reader takes a reply for, whatever the rules of a scorer: yes, no or unknown.

Thoughts (up to </think> and the like, or before "Answer:") and markup are left out. Then the first that is there counts:

    1. the first word, if it is yes or no in one of more than thirty languages, or true or false
    2. the first of the English words yes and no anywhere
    3. the first clause that begins with yes or no in one of those languages
    4. an English denial (isn't, not, none) without a word of doubt (sure, know, tell, clear, ...): no

>>> texts = ("**No**", "<think>yes?</think> NO!", "Well, yes", "Not sure", "Answer: Oui.", "There isn't one.", "是否有狗？没有")
>>> [plain(text) for text in texts]
['no', 'no', 'yes', 'unknown', 'yes', 'no', 'no']
"""

import re

WORDS = {
    "yes": "yes yeah yep sí si oui ja sim sì да tak evet có vâng نعم ya jah kyllä ano igen ναι так כן بله taip jā bəli true",
    "no": "no nope non nein não nao нет nie hayır hayir không nee nej لا tidak ei nem όχι οχι ні לא نه ne false",
}
BEGINNINGS = {
    "no": re.compile(
        r"不(?!确定|確定|知道|清楚|好意思|过|過|一定|能|可|仅|僅)|没(?!问题|問題)|沒(?!問題)|否|無|无|いいえ|いえ|いない|いません|な[いし]|ありません"
        r"|아니|아뇨|없|(?:जी\s*)?नही|ना(?!म)|ไม่(?!แน่|ทราบ|รู้)"
        r"|না(?=\W|$)|নেই|இல்லை|లేదు|ಇಲ್ಲ|ഇല്ല"
    ),
    "yes": re.compile(
        r"是(?!否|不是|不)|有(?!没有|沒有|無|无|可能|时|時|些)|对(?!不起|于|這|这)|對(?!不起|於|這)|はい|ええ|あります|います|네|예(?!를)|있"
        r"|ह(?:ाँ|ां)|जी(?!\s*न)|ใช่|มี|হ্যাঁ|জি(?=\W|$)|ஆம்|అవును|ಹೌದು|അതെ"
    ),
}
"""Of languages that put no space between words or inflect them."""
TAGS = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
THOUGHT = re.compile(rf"^.*[<◁\[]/(?:{TAGS})[>▷\]]|[<◁\[](?:{TAGS})[>▷\]].*", re.DOTALL | re.I)
ANSWER = re.compile(r"^.*\b(?:answer|conclusion)\W*[:：]|^.*答案\W*[:：是为為]", re.DOTALL | re.I)
MARKUP = re.compile(r"<[^<>]*>|[*_`#~\\]")
LEAD = re.compile(r"\W*(?:(?:the |final |my )*answer(?: is)?\W+)?")
CLAUSE = re.compile(r"[.,;:!?\n，。；：！？、،؟…—]+")
DENIAL = re.compile(r"n['’]t\b|\w not\b|\bnot \w|\b(?:none|nothing|neither|cannot|nowhere|absent)\b")
DOUBT = re.compile(
    r"\b(?:un)?(?:sure|clear|certain|able|known|know|likely)\b"
    r"|\b(?:tell|determine|say|possible|confirm|identify|sorry|only|if|provided?)\b"
)


def plain(reply: str) -> str:
    """Return yes, no or unknown."""
    text = MARKUP.sub(" ", THOUGHT.sub("", reply)).lower()
    marked = ANSWER.sub("", text)
    text = marked if re.search(r"\w", marked) else text
    if word := _beginning(text):
        return word
    if english := re.search(r"\b(yes|no)\b", text):
        return english[1]
    if word := next(filter(None, map(_beginning, CLAUSE.split(text))), ""):
        return word
    return "no" if DENIAL.search(text) and not DOUBT.search(text) else "unknown"


def _beginning(text: str) -> str:
    """The word, yes or no, that a text begins with; "" if it does not."""
    lead = LEAD.match(text)
    text = text[lead.end() :] if lead else text
    first = re.match(r"\w+", text)
    for word, same in WORDS.items():
        if (first and first[0] in same.split()) or BEGINNINGS[word].match(text):
            return word
    return ""
