// Opens a workflow in ComfyUI's real frontend as a person would: looks for missing nodes, adds a node by the search box, presses Run.
// Arguments: URL, WORKFLOW.json, what to search for, SCREENSHOT.png, folder of node_modules, browser. Prints a report as JSON.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const [url, workflow, search, screenshot, modules, executablePath] = process.argv.slice(2)
const { chromium } = createRequire(`${modules}/x.js`)('playwright-core')
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu'] })
const report = { errors: [], run: null }
try {
  const page = await browser.newPage({ viewport: { width: 1400, height: 900 } })
  await page.route((u) => u.origin !== new URL(url).origin && u.protocol.startsWith('http'), (route) => route.abort())
  // The frontend has errors of its own; ours come from files below /extensions.
  page.on('pageerror', (error) => {
    if (/\/extensions\/(?!core\/)/.test(String(error.stack))) report.errors.push(error.message)
  })
  page.on('websocket', (socket) => socket.on('framereceived', ({ payload }) => {
    const type = typeof payload === 'string' ? JSON.parse(payload).type : ''
    if (/^execution_(success|error|interrupted)$/.test(type)) report.run = type
  }))
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager &&
    Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 20 && !document.querySelector('#splash-loader'),
  null, { timeout: 120000 })
  await page.waitForTimeout(1000)
  for (let i = 0; i < 3; i++) await page.keyboard.press('Escape') // what greets a first visit

  const graph = JSON.parse(readFileSync(workflow, 'utf8'))
  const ofTheFrontend = ['Reroute', 'Note', 'MarkdownNote', 'PrimitiveNode']
  report.missing = await page.evaluate(([types, own]) => types.filter((t) =>
    !(t in window.LiteGraph.registered_node_types) && !own.includes(t)), [graph.nodes.map((n) => n.type), ofTheFrontend])
  await page.evaluate((g) => window.app.loadGraphData(g), graph)
  await page.waitForTimeout(1500)

  const button = page.locator('[data-testid="queue-button"]').first()
  const inner = button.locator('button').first()
  await ((await inner.count()) ? inner : button).click()
  for (let waited = 0; report.run === null && waited < 600; waited++) await page.waitForTimeout(500)
  await page.waitForTimeout(1000)
  await page.screenshot({ path: screenshot })
  // What our files in web/ make of the nodes: the line after a run, inputs without effect, the label in the list of models.
  report.upscaled = await page.evaluate(() => window.app.graph.nodes.filter((n) => n.type === 'QArtSRUpscale').map((n) => ({
    line: n.qartsrComparison?.line.textContent,
    shown: [n.qartsrComparison?.before, n.qartsrComparison?.after].every((image) => image?.naturalWidth > 0),
    grey: n.widgets.filter((w) => w.disabled).map((w) => w.name),
  })))
  report.labels = await page.evaluate(() => window.app.graph.nodes.filter((n) => n.type === 'QArtSRLoadModel').map((n) =>
    n.widgets[0].options.getOptionLabel(n.widgets[0].value)))

  const types = () => page.evaluate(() => window.app.graph.nodes.map((n) => n.type))
  report.added = []
  for (const [typed, x] of [[search, 700], ['QArtSR', 250]]) {
    const before = await types()
    await page.mouse.dblclick(x, 850)
    await page.waitForTimeout(2000)
    await page.keyboard.type(typed, { delay: 20 })
    await page.waitForTimeout(2000)
    await page.keyboard.press('Enter')
    await page.waitForTimeout(2000)
    report.added.push(...(await types()).slice(before.length))
    await page.keyboard.press('Escape')
  }
} finally {
  await browser.close()
}
console.log(JSON.stringify(report))
