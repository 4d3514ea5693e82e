"""The loops of the exact greedy, which numba compiles; importing this module loads numba.

`rows` are those of one stratum, see `Rows`; a row is known by its number among them. A running sum
is a (k, d) array: k is 1 for plain rows and, for outer products, the length of the left factor.
"""

import math
from typing import no_type_check

import numpy as np

from dq_multimodal.core.compiled import compile_float_loop, compile_loop

ROUNDING = 2.0**-24
"""Relative rounding of float32."""

SHORTEST = 2.0**-40
"""Added to norms in bounds: more than float32 loses where numbers are too small for it."""

MAX_EXPONENT = 1000
"""Rows are scaled by powers of two between 2^-1000 and 2^1000, which is exact."""

KNOT_PICKS = 8
"""Picks from one knot of the trajectory to the next, at most."""

N_STRETCHES, MAX_DOTS = 32, 16
"""Stretches of a trajectory that are bounded one by one, and products that a check may take for
each row; where it needs more, it counts fewer picks."""

MARGIN = 1.01
"""A row more than so many tie widths below the best can neither win nor tie, however rounded."""

NEEDS_PRODUCTS, NEEDS_CHECK, IS_DONE = 0, 1, 2
"""Why `pick_rows` comes back: the next pick has no products; a pick ends the pool, or no row or no
knot is left; or neither."""


@compile_float_loop
@no_type_check
def dot(a, b):
    """Give the inner product of two vectors, in float64."""
    total = 0.0
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@compile_float_loop
@no_type_check
def project(row, n_left, total):
    """Give the inner product of a row with a running sum."""
    if n_left == 0:
        return dot(row, total[0])
    found = 0.0
    for a in range(n_left):
        found += row[a] * dot(row[n_left:], total[a])
    return found


@compile_float_loop
@no_type_check
def add(row, n_left, times, total):
    """Add a row, so many times, to a running sum."""
    right = row[n_left:]
    for a in range(len(total)):
        share, line = times * row[a] if n_left else times, total[a]
        for j in range(len(right)):
            line[j] += share * right[j]


@compile_float_loop
@no_type_check
def distance(total, start, end, part):
    """Give how far a running sum is from a point of the chord between two others."""
    found = 0.0
    for a in range(len(total)):
        x, y, z = total[a], start[a], end[a]
        for j in range(len(x)):
            aside = x[j] - y[j] - part * (z[j] - y[j])
            found += aside * aside
    return np.sqrt(found)


@compile_float_loop
@no_type_check
def read(rows, i, bits, row):
    """Prepare row i in float64.

    The bits of a float16 number, moved into a float32 number, are that number times 2^-112.

    Args:
        bits: (w,) int32, overwritten.
        row: (w,) float64, where the row goes.
    """
    given = rows.values[rows.place[i]]
    if rows.is_half:
        for j in range(len(row)):
            half = np.int32(given[j])
            bits[j] = (half & np.int32(0x8000)) << np.int32(16)
            bits[j] |= (half & np.int32(0x7FFF)) << np.int32(13)
        floats = bits.view(np.float32)
        for j in range(len(row)):
            row[j] = np.float64(floats[j]) * 2.0**112
    else:
        for j in range(len(row)):
            row[j] = given[j]
    left, right, mean = row[: rows.n_left], row[rows.n_left :], rows.mean
    unit, factor = rows.units[0, i], rows.factors[0, i]
    for j in range(len(left)):
        left[j] *= unit
    for j in range(len(left)):  # one product of both could be beyond float64
        left[j] *= factor
    unit, factor = rows.units[1, i], rows.factors[1, i]
    for j in range(len(right)):
        right[j] = (right[j] * unit - mean[j]) * factor


@compile_float_loop
@no_type_check
def buffers(rows):
    """Give room for the bits of a row, and for a row."""
    width = rows.values.shape[1]
    return np.empty(width, np.int32), np.empty(width)


@compile_float_loop
@no_type_check
def scale_rows(rows, part):
    """Find the power of two and the factor that give the left factors (0) or the rest unit norm."""
    bits, row = buffers(rows)
    for i in range(len(rows.place)):
        read(rows, i, bits, row)
        numbers = row[rows.n_left :] if part else row[: rows.n_left]
        peak = np.abs(numbers).max()
        exponent = 1 - math.frexp(peak)[1] if peak > 0 else MAX_EXPONENT
        unit = math.ldexp(1.0, min(max(exponent, -MAX_EXPONENT), MAX_EXPONENT))
        for j in range(len(numbers)):
            numbers[j] *= unit
        norm = np.sqrt(dot(numbers, numbers))
        rows.units[part, i], rows.factors[part, i] = unit, 1 / norm if norm > 0 else 1.0


@compile_float_loop
@no_type_check
def square_rows(rows):
    """Work out the squared norms of all rows."""
    bits, row = buffers(rows)
    for i in range(len(rows.place)):
        read(rows, i, bits, row)
        left, right = row[: rows.n_left], row[rows.n_left :]
        rows.squares[i] = dot(right, right) * (dot(left, left) if rows.n_left else 1.0)


@compile_loop
@no_type_check
def hash_rows(rows, odd, hashes):
    """Hash the numbers of all rows as they are prepared; equal rows have equal hashes."""
    bits, row = buffers(rows)
    for i in range(len(rows.place)):
        read(rows, i, bits, row)
        hashes[i] = 0
        for j in range(len(row)):
            row[j] += 0.0  # no negative zeros
        words = row.view(np.uint64)
        for j in range(len(row)):
            hashes[i] += words[j] * odd[j]


@compile_float_loop
@no_type_check
def copy_rows(rows, numbers, block):
    """Prepare some rows, and round them to the floats of a block."""
    bits, row = buffers(rows)
    for k in range(len(numbers)):
        read(rows, numbers[k], bits, row)
        for j in range(len(row)):
            block[k, j] = row[j]


@compile_float_loop
@no_type_check
def add_rows(rows, numbers, times, total):
    """Add some rows, so many times each, to a running sum."""
    bits, row = buffers(rows)
    for i in numbers:
        read(rows, i, bits, row)
        add(row, rows.n_left, times, total)


@compile_float_loop
@no_type_check
def project_rows(rows, numbers, total, found):
    """Multiply some rows, read where they lie, with a running sum."""
    bits, row = buffers(rows)
    for k in range(len(numbers)):
        read(rows, numbers[k], bits, row)
        found[k] = project(row, rows.n_left, total)


@compile_float_loop
@no_type_check
def project_block(block, places, n_left, total, found):
    """Multiply some rows of a block with a running sum."""
    for k in range(len(places)):
        found[k] = project(block[places[k]], n_left, total)


@compile_float_loop
@no_type_check
def encode_rows(rows, numbers, codes, steps):
    """Round some rows to 8 bits: row = code x step; gives the length of what is lost, at most."""
    bits, row = buffers(rows)
    lost = 0.0
    for k in range(len(numbers)):
        read(rows, numbers[k], bits, row)
        peak = np.abs(row).max()
        step = np.float32(peak / 127 + SHORTEST)
        steps[k] = step
        for j in range(len(row)):
            codes[k, j] = np.int8(np.rint(row[j] / step))
            row[j] -= codes[k, j] * np.float64(step)
        lost = max(lost, np.sqrt(dot(row, row)))
    return lost


@compile_float_loop
@no_type_check
def scan(codes, steps, squares, total, factor, tilt, gains):
    """Work out the gains of coded rows, but for those that are used up."""
    single = total[0].astype(np.float32)
    for i in range(len(codes)):
        code, found = codes[i], np.float32(0)
        for j in range(len(single)):
            found += np.float32(code[j]) * single[j]
        if gains[i] > -np.inf:
            gains[i] = factor * steps[i] * found + tilt * squares[i]


@compile_float_loop
@no_type_check
def end_stretch(path, sums, n_picks, done):
    """Make a knot of the running sum after the last of some picks; `sums` holds it after each."""
    if n_picks == 0:
        return
    last, bend = path.last[0], 0.0
    for t in range(1, n_picks):
        bend = max(bend, distance(sums[t], sums[0], sums[n_picks], t / n_picks))
    path.bend[last], path.last[0] = bend, last + 1
    path.first[last + 1], path.sums[last + 1] = done, sums[n_picks]
    if last + 1 < len(path.low):
        path.low[last + 1] = np.inf
    sums[0] = sums[n_picks]


@compile_float_loop
@no_type_check
def pick_rows(rows, run, pool, products, slots, next_equal, total, path, rules, error, done, stop):
    """Make picks in a pool.

    Its gains are followed by products in float32, or worked out at each pick from rows in 8 bits,
    with a bound of their error; float64 decides between all that may win or tie.

    Args:
        rows: The rows.
        run: Of all rows their number, or the next equal one, -1 where none is left; of each pick
            its row, its number and its gain.
        pool: Rows, gains, squares and ends of the pool; see `Pool`. Codes and steps of
            `encode_rows` and what is lost, to work out all gains at each pick; or none.
        products: Inner products of some rows of the pool with all of it.
        slots: Of each row of the pool its place there, -1 for none.
        next_equal: See `find_equal`.
        total: The running sum.
        path: Knots of its trajectory; see `Path`.
        rules: f; in squared norms, by how much a gain rises with a pick and what it begins with;
            the tie width; the error of the product of two rows of norm 1; the longest norm.
        error: (2,) how far the gains of the pool may be off, and how many were worked out since.
        done: Picks made.
        stop: Picks to make in all.

    Returns:
        Picks made, why it came back (see `NEEDS_PRODUCTS`), and the place in the pool of the pick
        that has no products, or the end of the last pick.
    """
    numbers, picks, picked, made = run
    members, gains, squares, ends, codes, steps, lost = pool
    factor, rise, tilt, tie, rounding, widest = rules
    size, n_left = len(members), rows.n_left
    bits, row = buffers(rows)
    near, exact = np.empty(size, np.int64), np.empty(size)
    sums, n_since = np.empty((KNOT_PICKS + 1, *total.shape)), 0
    sums[0] = total
    while done < stop and path.last[0] < len(path.low):
        best = -np.inf
        if error[1] > size and not len(codes):
            error[:] = 0.0
            for i in range(size):
                if gains[i] > -np.inf:
                    read(rows, members[i], bits, row)
                    gains[i] = factor * project(row, n_left, total)
                    gains[i] += (tilt + rise * done) * squares[i]
        for i in range(size):
            best = max(best, gains[i])
        if best == -np.inf:
            end_stretch(path, sums, n_since, done)
            return done, NEEDS_CHECK, -1
        least, n_near = best - 2 * error[0] - MARGIN * tie, 0
        for i in range(size):
            if gains[i] >= least:
                near[n_near] = i
                n_near += 1
        top, at = -np.inf, -1
        for k in range(n_near):
            read(rows, members[near[k]], bits, row)
            exact[k] = factor * project(row, n_left, total)
            exact[k] += (tilt + rise * done) * squares[near[k]]
            top = max(top, exact[k])
        for k in range(n_near):
            i = near[k]
            if exact[k] >= top - tie and (at < 0 or numbers[members[i]] < numbers[members[at]]):
                at, made[done] = i, exact[k]
        error[1] += n_near - 1
        if not len(codes) and slots[at] < 0:
            end_stretch(path, sums, n_since, done)
            return done, NEEDS_PRODUCTS, at
        one = members[at]
        picks[done], picked[done] = one, numbers[one]
        path.low[path.last[0]] = min(path.low[path.last[0]], top - MARGIN * tie)
        numbers[one] = next_equal[numbers[one]] if len(next_equal) else -1
        if n_near > 1:  # else it was read last
            read(rows, one, bits, row)
        add(row, n_left, -2.0, total)
        if numbers[one] < 0:
            gains[at] = -np.inf
        if len(codes):
            scan(codes, steps, squares, total, factor, tilt + rise * (done + 1), gains)
            error[0] = factor * np.sqrt(dot(total[0], total[0]))
            error[0] *= lost + rounding * (widest + lost)
            error[1] = size + 1
        else:
            taken = products[slots[at]]
            for i in range(size):
                gains[i] += rise * squares[i] - 2 * factor * taken[i]
            error[0] += 2 * factor * rounding * (np.sqrt(squares[at]) + SHORTEST) * widest
        done, n_since = done + 1, n_since + 1
        sums[n_since] = total
        if n_since == KNOT_PICKS:
            end_stretch(path, sums, n_since, done)
            n_since = 0
        if ends[at] >= 0:
            end_stretch(path, sums, n_since, done)
            return done, NEEDS_CHECK, ends[at]
    end_stretch(path, sums, n_since, done)
    return done, IS_DONE if done == stop else NEEDS_CHECK, 0


@compile_float_loop
@no_type_check
def count_safe(rows, members, before, after, slack, path, knot, rules):
    """Count the stretches before the first in which one of some rows might have won or tied.

    The running sum went along a trajectory, and a gain is linear in it. So the gains of a row at
    both ends bound it in between: it leaves their chord by at most f |x| times the distance of the
    running sum from its own chord. Where that does not do, the gains at both ends of a stretch of
    the trajectory bound it there.

    Args:
        rows: The rows.
        members: Those to check; none was picked.
        before: Gain of each at the first knot; `after`: at the last.
        slack: How far gains may be off, for a row of norm 1, and for any.
        path: Knots of the trajectory; see `Path`.
        knot: The first of them.
        rules: See `pick_rows`, as at the first knot.

    Returns:
        The last knot up to which the picks are safe, and the inner products it took.
    """
    factor, rise, tilt, _, _, _ = rules
    last, n_left = path.last[0], rows.n_left
    bits, row = buffers(rows)
    n_stretches = min(N_STRETCHES, last - knot)
    edges = knot + np.arange(n_stretches + 1) * (last - knot) // n_stretches
    sums, first = path.sums[edges], path.first[edges] - path.first[knot]
    n_picks = first[n_stretches]
    low, aside = np.empty(n_stretches), np.empty(n_stretches + 1)
    bend, bend_within = np.empty(n_stretches), np.empty(n_stretches)
    for s in range(n_stretches + 1):
        aside[s] = distance(sums[s], sums[0], sums[n_stretches], first[s] / n_picks)
    for s in range(n_stretches):
        off = 0.0
        for k in range(edges[s] + 1, edges[s + 1]):
            part = (path.first[k] - path.first[edges[s]]) / (first[s + 1] - first[s])
            off = max(off, distance(path.sums[k], sums[s], sums[s + 1], part))
        off += path.bend[edges[s] : edges[s + 1]].max()
        low[s] = path.low[edges[s] : edges[s + 1]].min() - slack[1]
        bend_within[s] = factor * off + slack[0]
        bend[s] = factor * (max(aside[s], aside[s + 1]) + off) + slack[0]
    lowest, longest = low.min(), bend.max()
    n_safe, n_dots = n_stretches, 0
    for k in range(len(members)):
        square = rows.squares[members[k]]
        norm = np.sqrt(square) + SHORTEST
        if max(before[k], after[k]) + norm * longest < lowest:
            continue
        rises, is_read = (after[k] - before[k]) / n_picks, False
        for s in range(n_safe):
            most = before[k] + max(rises * first[s], rises * (first[s + 1] - 1))
            if most + norm * bend[s] < low[s]:
                continue
            if not is_read:
                read(rows, members[k], bits, row)
                is_read = True
            most = -np.inf
            for end in range(s, s + 2):
                gain = factor * project(row, n_left, sums[end])
                most = max(most, gain + (tilt + rise * first[end]) * square)
                n_dots += 1
                if first[s + 1] - first[s] == 1:
                    break
            if most + norm * bend_within[s] >= low[s] or n_dots > MAX_DOTS * len(members):
                n_safe = s
                break
    return edges[n_safe], n_dots
