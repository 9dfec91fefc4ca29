// Pages opened from files may not start web workers, and the search runs in one. This class has the interface of
// Worker that the search uses, and runs the script in a hidden frame.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.body.appendChild(document.createElement("iframe"));
    this.frame.hidden = true;
    this.loaded = new Promise((resolve) => (this.frame.onload = resolve));
    const frame = this.frame.contentWindow;
    window.addEventListener("message", ({ source, data }) => {
      if (source === frame) this.dispatchEvent(new MessageEvent("message", { data }));
    });
    frame.document.open();
    frame.document.write(`<body><script>
      postMessage = (data) => parent.postMessage(data, "*");
      importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done) => {
        const script = document.createElement("script");
        script.src = url;
        script.onload = done;
        document.body.append(script);
      })), Promise.resolve());
    </${"script"}><script src="${url}"></${"script"}></body>`);
    frame.document.close();
  }

  postMessage(data) {
    this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
