"""A canvas with boxes to move by mouse or keyboard; needs `anywidget` (`pip install "fmn-nb[lab]"`)."""

from __future__ import annotations

import anywidget
import traitlets

_SCRIPT = """
const STEP = 0.02, LEAST = 0.08, SHAKE = 0.012;  // nearer than SHAKE, a press is a click
function fit(v, low, high) { return Math.min(Math.max(v, low), high); }
function round(v) { return Math.round(v * 1000) / 1000; }
export default {
  render({ model, el }) {
    const size = model.get("size");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    canvas.tabIndex = 0;
    canvas.className = "fmn-boxes";
    canvas.style.cssText = "border:1px solid #888;touch-action:none;cursor:move;max-width:100%";
    canvas.setAttribute("role", "application");
    const pen = canvas.getContext("2d");
    const picture = new Image();
    picture.onload = draw;
    const things = () => model.get("boxes").map(one => ({ ...one }));
    function say() {
      const one = things()[model.get("selected")];
      canvas.setAttribute("aria-label", one
        ? `Boxes. ${one.name}: left ${one.box[0]}, top ${one.box[1]}, right ${one.box[2]}, bottom ${one.box[3]}. `
          + "Arrow keys move it, with Shift they size it, Tab leaves, N is the next one."
        : "No boxes yet.");
    }
    function draw() {
      pen.fillStyle = "white";
      pen.fillRect(0, 0, size, size);
      pen.imageSmoothingEnabled = false;
      if (picture.src && picture.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, size, size);
      things().forEach((one, number) => {
        const [x0, y0, x1, y1] = one.box.map(v => v * size);
        pen.strokeStyle = pen.fillStyle = one.colour;
        pen.lineWidth = number === model.get("selected") ? 3 : 1.5;
        pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
        pen.font = "13px sans-serif";
        pen.fillText(one.name, x0 + 4, y0 + 14);
      });
      say();
    }
    function put(number, box) {
      const all = things();
      all[number].box = box.map(round);
      model.set("boxes", all);
      model.save_changes();
    }
    function shifted(box, dx, dy) {
      dx = fit(dx, -box[0], 1 - box[2]);
      dy = fit(dy, -box[1], 1 - box[3]);
      return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy];
    }
    function sized(box, dx, dy) {
      return [box[0], box[1], fit(box[2] + dx, box[0] + LEAST, 1), fit(box[3] + dy, box[1] + LEAST, 1)];
    }
    function choose(number) { model.set("selected", number); model.save_changes(); draw(); }
    let drag = null;
    const at = event => {
      const area = canvas.getBoundingClientRect();
      return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
    };
    canvas.addEventListener("pointerdown", event => {
      const [x, y] = at(event), all = things();
      const hits = all.map((one, number) => number).filter(number => {
        const [x0, y0, x1, y1] = all[number].box;
        return x >= x0 - 0.02 && x <= x1 + 0.02 && y >= y0 - 0.02 && y <= y1 + 0.02;
      });
      if (!hits.length) return;
      const area = n => (all[n].box[2] - all[n].box[0]) * (all[n].box[3] - all[n].box[1]);
      const number = hits.sort((one, other) => area(one) - area(other))[0];  // the smallest lies in front
      const corner = Math.hypot(x - all[number].box[2], y - all[number].box[3]) < 0.06;
      drag = { number, corner, from: [x, y], box: all[number].box };
      choose(number);
      canvas.setPointerCapture(event.pointerId);
      canvas.focus();
    });
    canvas.addEventListener("pointermove", event => {
      if (!drag) return;
      const [x, y] = at(event), by = [x - drag.from[0], y - drag.from[1]];
      drag.far = drag.far || Math.hypot(...by) >= SHAKE;
      if (drag.far) put(drag.number, (drag.corner ? sized : shifted)(drag.box, ...by));
    });
    const finished = (number, before) => {  // a click, or a key at the rim, moves nothing
      if (things()[number].box.every((side, n) => Math.abs(side - before[n]) < 0.001)) return;
      model.set("moved", model.get("moved") + 1); model.save_changes();
    };
    const release = () => { if (drag) { const { number, box } = drag; drag = null; finished(number, box); } };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("keydown", event => {
      const number = model.get("selected"), one = things()[number];
      if (event.key === "n" || event.key === "N") {
        if (things().length) choose((number + 1) % things().length);
        event.stopPropagation(); event.preventDefault();
        return;
      }
      const by = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key];
      if (!by || !one) return;
      event.stopPropagation(); event.preventDefault();
      put(number, (event.shiftKey ? sized : shifted)(one.box, ...by));
      finished(number, one.box);
    });
    model.on("change:boxes", draw);
    model.on("change:selected", draw);
    model.on("change:picture", () => { picture.src = model.get("picture"); });
    if (model.get("picture")) picture.src = model.get("picture");
    draw();
    el.appendChild(canvas);
  },
};
"""


class BoxCanvas(anywidget.AnyWidget):
    """Boxes over a picture.

    Attributes:
        boxes: [{"name", "colour", "box": [x0, y0, x1, y1]}], sides in [0, 1].
        selected: the number of the box that keys move.
        picture: a data URL, or "".
        moved: counts finished moves; a drag counts once, when the mouse is released somewhere else.
    """

    _esm = _SCRIPT
    boxes = traitlets.List().tag(sync=True)
    selected = traitlets.Int(0).tag(sync=True)
    picture = traitlets.Unicode("").tag(sync=True)
    moved = traitlets.Int(0).tag(sync=True)
    size = traitlets.Int(256).tag(sync=True)
