"""Registers that a product still reads must not be written: in cuobjdump's text of an object, every write, in the order
of addresses, to a register that an HGMMA reads (operand A) before a wait that covers it.
  cuobjdump -sass build/src/backend/cuda/experts.cu.o > /tmp/sass; python3 lab/prefill/inflight.py /tmp/sass"""
import re
import sys

NO_RESULT = ('ST', 'BRA', 'BAR', 'R2UR', 'ISETP', 'FSETP', 'RED', 'MEMBAR', 'WARP', 'BSYNC', 'BSSY', 'UMOV', 'CALL',
             'RET', 'EXIT', 'NOP', 'VOTEU', 'YIELD', 'UBLKCP', 'FCHK', 'FENCE')


def written(text):
    op = re.sub(r'^@!?U?P\d+\s+', '', text)
    m = re.match(r'(\S+)\s+(?:!?U?P[\dT]*)?,?\s*R(\d+)', op)
    if not m or m[1].startswith(NO_RESULT):
        return range(0)
    n = 4 if '.128' in m[1] else 2 if '.64' in m[1] or 'WIDE' in m[1] or m[1].startswith('CS2R') else 1
    return range(int(m[2]), int(m[2]) + n)


def check(name, code):
    groups, group, products, bad = [], {}, 0, 0 # of registers: address of the product that reads it
    for at, text in code:
        wait = re.search(r'DEPBAR\.LE gsb0, 0x([0-9a-f]+)', text)
        product = re.search(r'HGMMA\.\S+ R\d+, R(\d+), gdesc', text)
        if wait:
            left = int(wait[1], 16)
            groups = groups[len(groups) - left:] if left else []
        elif product:
            products += 1
            group.update({int(product[1]) + i: at for i in range(4)})
            if 'gsb0' in text:
                groups.append(group)
                group = {}
        else:
            for r in written(text):
                for g in groups + [group]:
                    bad += r in g
                    if r in g and bad < 4:
                        print(f'  R{r} of the product at {g[r]}: {at} {text[:60]}')
    if products:
        print(f'{name[:100]}: {products} products, {bad} writes too early')
    return bad


name, code, bad = '', [], 0
for line in open(sys.argv[1]):
    if m := re.search(r'Function : (\S+)', line):
        bad += check(name, code)
        name, code = m[1], []
    elif m := re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);', line):
        code.append((m[1], m[2].strip()))
sys.exit(bad + check(name, code) > 0)
