"""Operands of PTX instructions as Python source: a register is `R[slot]`, an array with the bits of each thread."""

import re

import numpy as np
import ptx_arithmetic
from ptx_arithmetic import TYPES
from ptx_program import Instruction, Program


# Registers hold bits; instructions say what these are.
STORAGE = {"pred": "bool"} | {f"{kind}{bits}": f"u{bits}" for kind in "busf" for bits in (16, 32, 64)}


def size_of(kind: str) -> int:
    """Bytes of a number."""
    return int(kind.lstrip("busf")) // 8


class Operands:
    """Lines of source for the instructions of a block; `masked`: only threads in `m` are there."""

    def __init__(self, program: Program):
        self.program = program
        self.slots = {name: slot for slot, name in enumerate(program.registers)}
        self.parameters = {name: (place, kind) for place, (kind, name) in enumerate(program.parameters)}
        self.names = {name: value for name, value in vars(ptx_arithmetic).items() if not name.startswith("_")}
        self.names["where"] = np.where
        self.lines: list[str] = []
        self.masked = False

    def constant(self, value) -> str:
        """A name for a value that the source cannot spell."""
        name = f"constant_{type(value).__name__}_{value.tobytes().hex()}"
        self.names[name] = value
        return name

    def text(self, one: Instruction) -> str:
        """A name for the instruction itself, which messages quote."""
        name = f"text_{len(self.names)}"
        self.names[name] = one.text
        return name

    def read(self, operand: str, kind: str) -> str:
        """The operand's numbers in numpy's type for `kind`; bfloat16 as float32."""
        if operand in self.slots:
            return self._read_register(operand, kind)
        special = re.fullmatch(r"%((?:tid|ctaid)\.[xyz])", operand)
        if special:
            return f"M.special['{special[1]}']"
        if operand in self.program.symbols or operand == "global_smem":
            return self.constant(TYPES[kind](0))  # local and shared memory begin there
        return self.constant(self._immediate(operand, kind))

    def _read_register(self, operand: str, kind: str) -> str:
        register, stored = f"R[{self.slots[operand]}]", STORAGE[self.program.registers[operand]]
        if kind == "pred":
            return register
        if kind == "bf16":
            return f"from_bf16({register})"
        unsigned = f"u{8 * size_of(kind)}"
        if stored != unsigned:
            register = f"{register}.astype({unsigned})"
        return register if kind[0] in "ub" else f"{register}.view({kind})"

    def _immediate(self, operand: str, kind: str):
        if kind == "pred":
            return np.bool_(int(operand) != 0)
        bits = 16 if kind == "bf16" else 8 * size_of(kind)
        if operand.startswith(("0f", "0F", "0d", "0D")):
            number = int(operand[2:], 16)
        else:
            number = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
        if kind == "bf16":
            return np.uint32(number << 16).view(np.float32)
        return TYPES[f"u{bits}"](number).view(TYPES[kind])

    def active(self, instruction: Instruction) -> str:
        """Which threads execute it: an array of truth values, or `None` for all."""
        parts = ["m"] if self.masked else []
        if instruction.predicate:
            parts.append(self.predicate(instruction))
        return " & ".join(parts) or "None"

    def predicate(self, instruction: Instruction) -> str:
        return f"{'~' if instruction.negated else ''}R[{self.slots[instruction.predicate]}]"

    def write(self, instruction: Instruction, target: str, source: str, kind: str):
        """Adds the line that puts numbers of `kind` into a register."""
        if target == "_":
            return
        if kind == "bf16":
            source = f"to_bf16({source})"
        elif kind != "pred":
            stored, unsigned = STORAGE[self.program.registers[target]], f"u{8 * size_of(kind)}"
            if stored != unsigned:  # the sign of a signed number fills the rest
                source = f"({source}).astype({'s' if kind[0] == 's' else 'u'}{stored[1:]}).view({stored})"
            elif kind[0] in "sf":
                source = f"({source}).view({stored})"
        self.put(instruction, target, source)

    def put(self, instruction: Instruction, target: str, source: str):
        """Adds the line that gives a register its new bits, in the threads that execute the instruction."""
        register, active = f"R[{self.slots[target]}]", self.active(instruction)
        self.lines.append(f"{register} = {source if active == 'None' else f'where({active}, {source}, {register})'}")

    def address(self, operand: str, kind: str) -> str:
        """`[register + offset]`."""
        base, sign, offset = re.fullmatch(r"\[\s*([%\w@]+)\s*(?:([+-]+)\s*(\d+)\s*)?\]", operand).groups()
        source = self.read(base, kind)
        if offset and int(offset):
            source = f"({source} + {self.read(f'-{offset}' if '-' in sign else offset, kind)})"
        return source if base in self.slots else f"M.full({source})"

    def registers_of(self, operand: str | list[str]) -> str:
        return f"[{', '.join(f'R[{self.slots[name]}]' for name in parts_of(operand))}]"


def parts_of(operand: str | list[str]) -> list[str]:
    """The names in braces, or the one without."""
    return operand if isinstance(operand, list) else [operand]
