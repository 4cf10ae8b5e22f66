"""PTX text as basic blocks of instructions.

PTX is what Triton writes for an NVIDIA GPU, before `ptxas` makes machine code of it. This reads as much of it as LLVM
and Triton write for a kernel: one function, no calls.
"""

import re
from dataclasses import dataclass, field


@dataclass
class Instruction:
    """`@predicate operation.modifiers operands`. A list in braces is one operand, a list of names."""

    operation: str
    modifiers: list[str]
    operands: list
    predicate: str | None
    negated: bool
    text: str


@dataclass
class Program:
    """Blocks of instructions in the order of the text, which start where a label stands or a branch ends."""

    parameters: list[tuple[str, str]]  # type and name
    registers: dict[str, str]  # name → type
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # label → block
    threads: int
    rank: list[int] = field(default_factory=list)  # of each block: those behind go on first where threads part
    local_bytes: int = 0
    shared_cell: int = 4  # bytes of the smallest access to shared memory, but 2 at least
    symbols: set[str] = field(default_factory=set)  # names of local memory, which begins at zero
    written: set[int] = field(default_factory=set)  # parameters that lead to what is written in global memory
    written_cell: int = 16  # bytes of the smallest write there


def _split(text: str) -> list:
    """Operands, separated by commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text + ","):
        depth += letter in "{[" or -(letter in "}]")
        if letter == "," and depth == 0:
            part = text[start:place].strip()
            found.append(_split(part[1:-1]) if part.startswith("{") else part)
            start = place + 1
    return [part for part in found if part != ""]


def _statements(body: str):
    """Labels, braces and instructions, one at a time."""
    body = re.sub(r"//[^\n]*", "", body)
    place = 0
    pattern = re.compile(r"\s*(?:(\$?\w+):|\.(?:loc|pragma)\b[^\n]*|(\{)|(\})|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)")
    while body[place:].strip():
        match = pattern.match(body, place)
        if match is None:
            raise ValueError(f"cannot read {body[place : place + 200]!r}")
        place = match.end()
        yield match


def parse(ptx: str) -> Program:
    """The one entry of a PTX module.

    Raises:
        ValueError: it has none, or something that Triton is not known to write.
    """
    entry = re.search(r"\.entry\s+\w+\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("no entry in this PTX")
    head, directives, body = entry.groups()
    parameters = re.findall(
        r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", re.sub(r"\.ptr[^,\n]*?(?=\s\w+\s*(?:,|$))", "", head.strip())
    )
    program = Program(parameters, {}, [[]], {}, int(re.search(r"\.reqntid\s+(\d+)", directives)[1]))
    scope: list[dict[str, str]] = []
    for match in _statements(body):
        label, opens, closes, text = match.groups()
        if label:
            if label.startswith(("$L__tmp", "$L__func")):  # of the debug information
                continue
            if program.blocks[-1]:
                program.blocks.append([])
            program.labels[label] = len(program.blocks) - 1
        elif opens:
            scope.append({})
        elif closes:
            scope.pop()
        elif text:
            text = " ".join(text.split())
            declared = re.fullmatch(r"\.reg \.(\w+) (.*)", text)
            local = re.fullmatch(r"\.local \.align \d+ \.b8 (\w+)\[(\d+)\]", text)
            if declared:
                kind, names = declared.groups()
                for name in names.split(","):
                    name = name.strip()
                    many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
                    if many:
                        program.registers |= {f"{many[1]}{i}": kind for i in range(int(many[2]))}
                    elif scope:
                        scope[-1][name] = f"{name}@{len(program.registers)}"
                        program.registers[scope[-1][name]] = kind
                    else:
                        program.registers[name] = kind
            elif local:
                if program.symbols:
                    raise ValueError(f"a second piece of local memory: {text!r}")
                program.symbols.add(local[1])
                program.local_bytes = int(local[2])
            elif text:
                instruction = _instruction(text, {name: new for names in scope for name, new in names.items()})
                program.blocks[-1].append(instruction)
                if instruction.operation in ("bra", "ret"):
                    program.blocks.append([])
    program.rank = _rank(program)
    if re.search(r"\b(?:ld|st)\.shared(?:\.v\d)?\.[bus](?:8|16)\b", body):
        program.shared_cell = 2
    _find_written(program)
    return program


def _find_written(program: Program):
    """From which parameters the addresses of writes to global memory are computed.

    They may have been in shared or local memory, which counts as one place; in global memory there are none.
    """
    numbers = {name: number for number, (_, name) in enumerate(program.parameters)}
    sources: dict[str, set[int]] = {name: set() for name in [*program.registers, "memory"]}
    instructions = [one for block in program.blocks for one in block]

    def names_in(operands) -> list[str]:
        return [name for name in re.findall(r"%[\w@]+", str(operands)) if name in sources]

    def sources_of(names) -> set[int]:
        return set().union(*(sources[name] for name in names))

    changed = True
    while changed:
        changed = False
        for one in instructions:
            targets, found = names_in(one.operands[:1]), sources_of(names_in(one.operands[1:]))
            if one.operation in ("ld", "ldmatrix"):
                found = sources["memory"]
                if "param" in one.modifiers:
                    found = {numbers[one.operands[1].strip("[]")]}
                elif "global" in one.modifiers:
                    found = set()
            elif one.operation in ("st", "stmatrix"):
                targets = [] if "global" in one.modifiers else ["memory"]
            elif one.operation in ("atom", "red", "cp", "bar", "bra"):
                continue
            for name in targets:
                changed |= not found <= sources[name]
                sources[name] |= found
    for one in instructions:
        if one.operation in ("st", "atom", "red") and "global" in one.modifiers:
            program.written |= sources_of(names_in(one.operands[one.operation == "atom"]))
            program.written_cell = min(program.written_cell, int(one.modifiers[-1].lstrip("busf")) // 8)


def _successors(program: Program) -> list[list[int]]:
    found = []
    for number, block in enumerate(program.blocks):
        last = block[-1] if block else None
        goes_on = last is None or last.operation not in ("bra", "ret") or last.predicate is not None
        targets = [number + 1] if goes_on and number + 1 < len(program.blocks) else []
        if last is not None and last.operation == "bra":
            targets.append(program.labels[last.operands[0]])
        found.append(targets)
    return found


def _rank(program: Program) -> list[int]:
    """An order in which a block stands before those that it leads to, and a loop before what comes after it.

    Threads that part meet again where their ways do if the least block of this order always goes on.
    """
    after = _successors(program)
    before: list[list[int]] = [[] for _ in after]
    for number, targets in enumerate(after):
        for target in targets:
            before[target].append(number)
    loops: list[set[int]] = [set() for _ in after]  # the heads of the loops that a block is in
    for number, targets in enumerate(after):
        for head in targets:
            if head <= number:
                inside, waiting = {head}, [number]
                while waiting:
                    one = waiting.pop()
                    if one not in inside:
                        inside.add(one)
                        waiting += before[one]
                for one in inside:
                    loops[one].add(head)
    order, seen = [], {0}
    stack = [(0, iter(sorted(after[0], key=lambda target: -len(loops[0] - loops[target]))))]
    while stack:
        number, targets = stack[-1]
        target = next(targets, None)
        if target is None:
            order.append(number)
            stack.pop()
        elif target not in seen:
            seen.add(target)
            ways = sorted(after[target], key=lambda way: -len(loops[target] - loops[way]))
            stack.append((target, iter(ways)))
    rank = [len(after)] * len(after)
    for place, number in enumerate(reversed(order)):
        rank[number] = place
    return rank


def _instruction(text: str, names: dict[str, str]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.:]+)(?: (.*))?", text)
    if match is None:
        raise ValueError(f"cannot read {text!r}")
    negated, predicate, name, operands = match.groups()
    operation, *modifiers = name.replace("::", "_").split(".")

    def renamed(operand):
        return [renamed(part) for part in operand] if isinstance(operand, list) else names.get(operand, operand)

    operands = [renamed(operand) for operand in _split(operands or "")]
    return Instruction(operation, modifiers, operands, names.get(predicate, predicate), bool(negated), text)
