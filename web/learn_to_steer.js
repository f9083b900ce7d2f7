// Shows on a node the text that it returned from its last run. The text belongs to the run, not to the workflow: it is
// neither saved nor sent to the server.
import { app } from "../../scripts/app.js";

const WIDGET = "learn_to_steer_text";
const SHOWN = {
  LearnToSteerGraph: { lines: 5, placeholder: "after a run: the relations that were understood" },
  LearnToSteerReport: { lines: 12, placeholder: "after a run: every update of the steering", wrap: "pre" },
  LearnToSteerToyJudge: { lines: 5, placeholder: "after a run: what the picture shows" },
  LearnToSteerDatasetBuilder: { lines: 5, placeholder: "after a run: what is in the dataset" },
  LearnToSteerTrain: { lines: 5, placeholder: "after a run: accuracy on true and wrong captions" },
  LearnToSteerSaveClassifier: { lines: 3, placeholder: "after a run: where the file is" },
};
const LINE_HEIGHT = 16;

function addTextWidget(node, { lines, placeholder, wrap = "pre-wrap" }) {
  const options = { multiline: true, default: "", placeholder };
  const widget = app.widgets.STRING(node, WIDGET, ["STRING", options], app).widget;
  widget.label = "result";
  widget.serialize = false;
  Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => lines * LINE_HEIGHT });
  const element = widget.element ?? widget.inputEl;
  if (element) {
    element.readOnly = true;
    Object.assign(element.style, { fontFamily: "monospace", fontSize: "11px", whiteSpace: wrap, opacity: 0.85 });
  }
  // a text field has a socket on this page; this one takes no input
  const socket = node.inputs?.findIndex((input) => input.widget?.name === WIDGET) ?? -1;
  if (socket >= 0) node.removeInput(socket);
}

function showText(node, output) {
  const widget = node?.widgets?.find(({ name }) => name === WIDGET);
  if (!widget || !output?.text) return;
  widget.value = Array.isArray(output.text) ? output.text.join("\n\n") : String(output.text);
}

app.registerExtension({
  name: "learntosteer.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const shown = SHOWN[nodeData.name];
    if (!shown) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      addTextWidget(this, shown);
    };
    nodeType.prototype.onExecuted = function (output, ...args) {
      onExecuted?.call(this, output, ...args);
      showText(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) {  // results that come back with a tab or a reload
    for (const [id, output] of Object.entries(outputs)) showText(app.rootGraph?.getNodeById?.(Number(id)), output);
  },
});
