"""PTX instructions as Python source, a function for each block.

A function takes the registers `R` of all threads and the machine `M`; that for a part of the threads also takes `m`,
which those are. What it returns says where they go: nothing (on to the next block), the number of a block, or a
predicate and the number for those of whom it is true.
"""

import re

from ptx_operands import Operands, parts_of, size_of
from ptx_program import Instruction, Program


END = 1 << 30  # the block of those who are done
# What may stand behind an operation besides types and shapes: of any other form nothing is known here.
FORMS = {
    "abs": "ftz", "add": "rn ftz", "and": "", "atom": "acq_rel relaxed sys gpu global shared add", "bar": "sync warp",
    "bfe": "", "bra": "uni", "copysign": "", "cp": "async ca cg global shared wait_group commit_group",
    "cvt": "ftz rmi rn rpi rzi", "cvta": "local", "div": "full rn", "ex2": "approx ftz",
    "fence": "proxy async shared_cta", "fma": "ftz rn", "ld": "global param shared",
    "ldmatrix": "aligned m8n8 shared sync trans", "mad": "lo wide", "max": "relu", "min": "relu",
    "mma": "aligned col row sync", "mov": "", "mul": "hi lo rn wide ftz", "neg": "", "not": "", "or": "", "popc": "",
    "prmt": "", "rcp": "approx ftz", "red": "gpu relaxed global add", "redux": "add max sync", "rem": "", "ret": "",
    "selp": "", "setp": "eq ge geu gt le leu lt ltu ne neu num", "shfl": "bfly idx sync up", "shl": "", "shr": "",
    "sqrt": "approx ftz", "st": "global shared shared_cta", "stmatrix": "aligned m8n8 shared sync", "sub": "ftz rn",
    "wgmma": "aligned mma_async sync fence commit_group wait_group", "xor": "",
}  # fmt: skip
TEMPLATES = {
    "abs": "np.abs({0})", "add": "{0} + {1}", "and": "{0} & {1}", "copysign": "np.copysign({1}, {0})", "cvta": "{0}",
    "div": "divide({0}, {1})", "ex2": "np.exp2({0})", "fma": "fma({0}, {1}, {2})", "neg": "-{0}", "not": "~{0}",
    "or": "{0} | {1}", "popc": "np.bitwise_count({0}).astype(u32)", "prmt": "permute_bytes({0}, {1}, {2})",
    "rcp": "1 / {0}", "rem": "{0} - divide({0}, {1}) * {1}", "sqrt": "np.sqrt({0})", "sub": "{0} - {1}",
    "xor": "{0} ^ {1}",
}  # fmt: skip
TYPE_OR_SHAPE = re.compile(r"[busf](?:8|16|32|64)|bf16|bf16x2|f16x2|pred|tf32|m64n\d+k\d+|m16n8k\d+|v[24]|x[124]")
FLOATS = ("f16", "bf16", "f32", "f64")
TO_WHOLE = {"rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


class Translation(Operands):
    """The functions of a program's blocks, each made when it is first asked for."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.functions = {}

    def function(self, block: int, masked: bool):
        key = block, masked
        if key not in self.functions:
            self.lines, self.masked = [], masked
            for instruction in self.program.blocks[block]:
                self.translate(instruction)
            head = f"def block(R, M{', m' if masked else ''}):"
            scope: dict = {}
            source = "\n    ".join([head, *(self.lines or ["pass"])])
            exec(compile(source, f"<block {block}>", "exec"), self.names, scope)
            self.functions[key] = scope["block"]
        return self.functions[key]

    def translate(self, one: Instruction):
        known = FORMS.get(one.operation)
        words = [word for word in one.modifiers if not TYPE_OR_SHAPE.fullmatch(word)]
        if known is None or not set(known.split()).issuperset(words):
            raise NotImplementedError(f"PTX instruction {one.text}")
        if one.operation in TEMPLATES:
            self.compute(one, TEMPLATES[one.operation])
        else:
            getattr(self, f"on_{one.operation}")(one)

    # Arithmetic

    def compute(self, one: Instruction, template: str, kinds: list[str] | None = None):
        """`template` of the operands `{0}`, `{1}`, …, all of the instruction's type where nothing else is said."""
        kind = one.modifiers[-1]
        kinds = kinds or [kind] * (len(one.operands) - 1)
        values = [self.read(operand, its) for operand, its in zip(one.operands[1:], kinds, strict=True)]
        if "ftz" in one.modifiers and kind == "f32":
            values = [f"flush({value})" for value in values]
            template = f"flush({template})"
        self.write(one, one.operands[0], template.format(*values), kind)

    def on_mul(self, one):
        if "wide" in one.modifiers:
            self.multiply_wide(one, "{0} * {1}")
        elif "hi" in one.modifiers:
            self.compute(one, "high_part({0}, {1})")
        else:
            self.compute(one, "{0} * {1}")

    def on_mad(self, one):
        if "wide" in one.modifiers:
            self.multiply_wide(one, "{0} * {1} + {2}")
        else:
            self.compute(one, "{0} * {1} + {2}")

    def multiply_wide(self, one, template):
        """Of two numbers, whose product has twice their bits."""
        kind = one.modifiers[-1]
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        values = [f"{self.read(operand, kind)}.astype({wide})" for operand in one.operands[1:3]]
        values += [self.read(operand, wide) for operand in one.operands[3:]]
        self.write(one, one.operands[0], template.format(*values), wide)

    def on_min(self, one):
        self.least_or_greatest(one, "min")

    def on_max(self, one):
        self.least_or_greatest(one, "max")

    def least_or_greatest(self, one, name):
        """Of floats, the one that is a number; `relu`: and not less than zero."""
        kind = one.modifiers[-1]
        template = f"np.{'f' if kind in FLOATS else ''}{name}{'' if kind in FLOATS else 'imum'}({{0}}, {{1}})"
        if "relu" in one.modifiers:
            template = f"np.maximum({template}, {self.read('0', kind)})"
        self.compute(one, template)

    def on_shl(self, one):
        self.compute(one, "shift_left({0}, {1})", [one.modifiers[-1], "u32"])

    def on_shr(self, one):
        self.compute(one, "shift_right({0}, {1})", [one.modifiers[-1], "u32"])

    def on_bfe(self, one):
        self.compute(one, "extract_bits({0}, {1}, {2})", [one.modifiers[-1], "u32", "u32"])

    def on_selp(self, one):
        kind = one.modifiers[-1]
        self.compute(one, "where({2}, {0}, {1})", [kind, kind, "pred"])

    def on_setp(self, one):
        comparison, *_, kind = one.modifiers
        a, b = (self.read(operand, kind) for operand in one.operands[1:])
        self.put(one, one.operands[0], f"compare('{comparison}', {a}, {b})")

    def on_mov(self, one):
        """Also of several registers as one, or of one as several: the first has the lowest bits."""
        target, source = one.operands
        kind = one.modifiers[-1]
        if isinstance(target, list):
            bits = 8 * size_of(kind) // len(target)
            for place, name in enumerate(target):
                part = f"({self.read(source, kind)} >> {kind_of(kind)}({place * bits})).astype(u{bits})"
                self.write(one, name, part, f"b{bits}")
        elif isinstance(source, list):
            bits, whole = 8 * size_of(kind) // len(source), kind_of(kind)
            parts = [
                f"({self.read(name, f'b{bits}')}.astype({whole}) << {whole}({place * bits}))"
                for place, name in enumerate(source)
            ]
            self.write(one, target, " | ".join(parts), whole)
        else:
            self.write(one, target, f"M.full({self.read(source, kind)})", kind)

    def on_cvt(self, one):
        *options, to, of = one.modifiers
        target, *sources = one.operands
        if to in ("bf16x2", "f16x2"):
            convert = "to_bf16({})" if to == "bf16x2" else "({}).astype(f16).view(u16)"
            high, low = (f"{convert.format(self.read(operand, of))}.astype(u32)" for operand in sources)
            self.write(one, target, f"({high} << u32(16)) | {low}", "u32")
            return
        value = self.read(sources[0], of)
        if "ftz" in options and of == "f32":
            value = f"flush({value})"
        whole = next((TO_WHOLE[option] for option in options if option in TO_WHOLE), None)
        if of in FLOATS and to in FLOATS:
            converted = f"{whole}({value})" if whole else f"({value}).astype({'f32' if to == 'bf16' else to})"
        elif of in FLOATS:
            converted = f"to_integer({whole}({value}), {to})"
        else:
            converted = f"({value}).astype({to})"
        self.write(one, target, converted, to)

    # Memory

    def space(self, one) -> str:
        names = [
            name for name in ("global", "shared", "param") for modifier in one.modifiers if modifier.startswith(name)
        ]
        # Without a name it may be any; of what Triton writes only local memory is.
        return names[0] if names else "local"

    def on_ld(self, one):
        space, kind = self.space(one), one.modifiers[-1]
        if space == "param":
            place, declared = self.parameters[one.operands[1].strip("[]")]
            self.write(one, one.operands[0], f"M.parameter({place}, {declared}).view({kind_of(kind)})", kind)
            return
        targets, width = parts_of(one.operands[0]), size_of(kind)
        address = self.address(one.operands[1], "u32" if space == "shared" else "u64")
        self.lines.append(
            f"t = M.load_{space}({address}, {width * len(targets)}, {self.active(one)}, {self.text(one)}, {width})"
        )
        for place, name in enumerate(targets):
            self.write(one, name, f"t[:, {place}].copy().view({kind_of(kind)})", kind)

    def on_st(self, one):
        space, width = self.space(one), size_of(one.modifiers[-1])
        address = self.address(one.operands[0], "u32" if space == "shared" else "u64")
        values = [f"M.full({self.read(name, f'b{8 * width}')})" for name in parts_of(one.operands[1])]
        self.lines.append(
            f"M.store_{space}({address}, {width * len(values)}, {self.active(one)}, {self.text(one)}, {width}, "
            f"np.stack([{', '.join(values)}], axis=1))"
        )

    def on_atom(self, one):
        space, kind = self.space(one), one.modifiers[-1]
        targets, address, values = one.operands if one.operation == "atom" else ([], *one.operands)
        values = [f"M.full({self.read(name, kind)})" for name in parts_of(values)]
        self.lines.append(
            f"t = M.add_{space}({self.address(address, 'u32' if space == 'shared' else 'u64')}, {self.active(one)}, "
            f"{self.text(one)}, {kind}, [{', '.join(values)}])"
        )
        for place, name in enumerate(parts_of(targets)):
            self.write(one, name, f"t[{place}]", kind)

    def on_red(self, one):
        """An atomic operation of which nobody wants to know what was there."""
        self.on_atom(one)

    def on_cp(self, one):
        if "wait_group" in one.modifiers:
            self.lines.append(f"M.wait_for_copies({self.active(one)}, {one.operands[0]})")
        elif "commit_group" in one.modifiers:
            self.lines.append(f"M.commit_copies({self.active(one)})")
        else:
            target, source, size, given = one.operands
            self.lines.append(
                f"M.copy({self.address(target, 'u32')}, {self.address(source, 'u64')}, {int(size, 0)}, "
                f"{self.read(given, 'u32')}, {self.active(one)}, {self.text(one)})"
            )

    # Threads together

    def on_bar(self, one):
        if one.operands == ["-1"]:  # of a warp
            self.together(one)
        elif one.operands != ["0"]:
            raise NotImplementedError(f"PTX instruction {one.text}")
        else:
            self.lines.append(f"M.barrier({self.active(one)})")

    def on_fence(self, one):
        self.lines.append(f"M.fence({self.active(one)})")

    def together(self, one, threads=32):
        """Adds the line that asks for all threads of each warp that is there, or group of four warps."""
        if self.masked:
            self.lines.append(f"M.together({self.active(one)}, {threads}, {self.text(one)})")

    def on_shfl(self, one):
        self.together(one)
        value, offset, clamp = (f"M.full({self.read(operand, 'u32')})" for operand in one.operands[1:4])
        self.put(one, one.operands[0], f"M.shuffle('{one.modifiers[1]}', {value}, {offset}, {clamp})")

    def on_redux(self, one):
        self.together(one)
        kind = one.modifiers[-1]
        value = self.read(one.operands[1], kind)
        self.write(one, one.operands[0], f"M.reduce('{one.modifiers[1]}', {value})", kind)

    def results(self, one, operand):
        for place, name in enumerate(parts_of(operand)):
            self.put(one, name, f"t[{place}]")

    def on_mma(self, one):
        self.together(one)
        *_, shape, _, _, _, kind, _, _ = one.modifiers
        operands = ", ".join(map(self.registers_of, one.operands[1:]))
        self.lines.append(f"t = M.multiply('{shape}', '{kind}', {operands})")
        self.results(one, one.operands[0])

    def on_ldmatrix(self, one):
        targets, address = one.operands
        self.lines.append(
            f"t = M.load_matrices({self.address(address, 'u32')}, {len(targets)}, {'trans' in one.modifiers}, "
            f"{self.active(one)}, {self.text(one)})"
        )
        self.results(one, targets)

    def on_stmatrix(self, one):
        address, sources = one.operands
        self.lines.append(
            f"M.store_matrices({self.address(address, 'u32')}, {self.registers_of(sources)}, "
            f"{'trans' in one.modifiers}, {self.active(one)}, {self.text(one)})"
        )

    def on_wgmma(self, one):
        if "commit_group" in one.modifiers:
            self.lines.append(f"M.commit_products({self.active(one)})")
        elif "wait_group" in one.modifiers:
            self.lines.append(f"M.wait_for_products({self.active(one)}, {one.operands[0]})")
        elif "mma_async" in one.modifiers:
            self.multiply_group(one)

    def multiply_group(self, one):
        self.together(one, 128)
        *_, shape, _, kind, _ = one.modifiers
        sums, left, right, keep, *signs = one.operands
        transposed = [flag == "1" for flag in signs[2:]]  # of an operand in registers, or of TF32, nothing is said
        transposed = [False] * (2 - len(transposed)) + transposed
        if signs[:2] != ["1", "1"]:
            raise NotImplementedError(f"PTX instruction {one.text}")
        left = self.registers_of(left) if isinstance(left, list) else self.read(left, "u64")
        self.lines.append(
            f"t = M.multiply_group('{shape}', '{kind}', {left}, {self.read(right, 'u64')}, {self.registers_of(sums)}, "
            f"{self.read(keep, 'pred')}, {transposed}, {self.active(one)}, {self.text(one)})"
        )
        self.results(one, sums)

    # Where to go on

    def go(self, one, block: int):
        where = f"{self.predicate(one)}, {block}" if one.predicate else f"{block}"
        self.lines.append(f"return {where}")

    def on_bra(self, one):
        self.go(one, self.program.labels[one.operands[0]])

    def on_ret(self, one):
        self.go(one, END)


def kind_of(kind: str) -> str:
    """The numpy type of what is loaded, moved or kept: bits are unsigned integers."""
    return f"u{kind[1:]}" if kind[0] == "b" else kind
