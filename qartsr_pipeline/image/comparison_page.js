'use strict'
// Makes a slider of every list of images that `comparison_html` wrote. Two of them lie over one another, and a divider, which is
// dragged, says how much is shown of each. Lengths are CSS pixels of the stage, the box in which the images lie.

const STEPS = [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8]
const LARGEST = STEPS[STEPS.length - 1]
const CRISP = 2 // from this zoom on, pixels are shown as squares
const GESTURE = 300 // milliseconds without a turn of the wheel, after which a new turn is a new gesture
let scrolledAt = -Infinity // when the wheel last scrolled the page

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value
    else element.setAttribute(name, value)
  }
  element.append(...children)
  return element
}

const between = (low, value, high) => Math.min(Math.max(value, low), high)

class Slider {
  constructor(figure) {
    const list = figure.querySelector('ol')
    this.images = [...list.children].map((item) => ({
      name: item.querySelector('strong').textContent,
      caption: item.querySelector('span').textContent,
      element: item.querySelector('img'),
    }))
    // The attributes: the properties give the size in which the list shows the image.
    this.width = Number(this.images[0].element.getAttribute('width'))
    this.height = Number(this.images[0].element.getAttribute('height'))
    this.zoom = 1
    this.x = this.y = 0 // where the images' upper left corner lies
    this.cut = 0.5 // share of the stage that the left image has
    this.fitted = 1 // the largest zoom at which the whole image is kept in view when the stage changes; 0 once somebody has zoomed
    this.touches = new Map()
    this.build(figure)
    list.remove()
    this.choose({ left: Number(figure.dataset.left), right: Number(figure.dataset.right) })
    this.listen()
    new ResizeObserver(() => this.resize()).observe(this.viewer)
  }

  build(figure) {
    this.layers = { left: make('div', { className: 'layer left' }), right: make('div', { className: 'layer right' }) }
    this.divider = make('div', { className: 'divider', role: 'slider', tabIndex: 0, 'aria-orientation': 'horizontal',
      'aria-label': 'Divider between the left and the right image', 'aria-valuemin': 0, 'aria-valuemax': 100 })
    this.stage = make('div', { className: 'stage', role: 'group', tabIndex: 0,
      'aria-label': `${figure.querySelector('strong').textContent}: two images over one another, which arrow keys move` },
    this.layers.right, this.layers.left, this.divider)
    this.sides = {}
    for (const [key, title] of [['left', 'Left'], ['right', 'Right']]) {
      const select = make('select', { onchange: () => this.choose({ [key]: select.selectedIndex }) },
        ...this.images.map((image) => make('option', {}, image.name)))
      const caption = make('p')
      this.sides[key] = { select, caption, box: make('div', { className: 'side' }, make('label', {}, `${title} `, select), caption) }
    }
    const button = (text, title, onclick, more) => make('button', { type: 'button', title, 'aria-label': title, onclick, ...more }, text)
    this.shown = make('output')
    this.blind = button('Blind', 'Shuffle the two and hide their names', () => this.guess(), { 'aria-pressed': false, className: 'blind' })
    const tools = make('div', { className: 'tools', role: 'group', 'aria-label': 'Zoom and sides' },
      button('−', 'Zoom out', () => this.step(-1)), this.shown, button('+', 'Zoom in', () => this.step(1)),
      button('1 : 1', 'One pixel of the image a pixel of the page, 100 %', () => this.zoomTo(1)), button('Fit', 'Fit', () => this.fit()),
      button('⇄', 'Swap left and right', () => this.swap()), this.blind)
    this.viewer = make('div', { className: 'viewer' },
      make('div', { className: 'bar' }, this.sides.left.box, tools, this.sides.right.box), this.stage,
      make('p', { className: 'hint' }, 'Drag the line to compare, the images to move them; the wheel or two fingers zoom. ',
        make('span', { className: 'keys' }, 'Keys: arrows; + and − zoom, 0 is 100 %, F fits; 1 to 9 choose the right image, with Shift'
          + ' the left one; S swaps.')))
    if (document.fullscreenEnabled) {
      tools.append(button('Full screen', 'Full screen', () =>
        document.fullscreenElement ? document.exitFullscreen() : this.viewer.requestFullscreen()))
    }
    figure.append(this.viewer)
  }

  listen() {
    this.viewer.addEventListener('keydown', (event) => this.key(event))
    this.stage.addEventListener('wheel', (event) => this.wheel(event), { passive: false })
    this.stage.addEventListener('pointerdown', (event) => this.press(event))
    this.stage.addEventListener('pointermove', (event) => this.drag(event))
    for (const type of ['pointerup', 'pointercancel']) this.stage.addEventListener(type, (event) => this.release(event))
  }

  // The images

  choose({ left = this.left, right = this.right }) {
    if (left === right) [left, right] = left === this.left ? [this.right, right] : [left, this.left] // they change places
    this.left = left
    this.right = right
    for (const key of ['left', 'right']) {
      const { name, caption, element } = this.images[this[key]]
      this.layers[key].replaceChildren(element)
      this.sides[key].select.selectedIndex = this[key]
      this.sides[key].caption.textContent = caption
    }
    this.draw()
  }

  swap() {
    if (!this.hidden) this.choose({ left: this.right, right: this.left })
  }

  // Whether somebody can tell two images apart is found out without their names.
  guess() {
    this.hidden = !this.hidden
    if (this.hidden && Math.random() < 0.5) this.choose({ left: this.right, right: this.left })
    this.blind.setAttribute('aria-pressed', this.hidden)
    this.blind.textContent = this.hidden ? 'Reveal' : 'Blind'
    for (const key of ['left', 'right']) {
      const { select, caption } = this.sides[key]
      select.disabled = this.hidden
      select.style.visibility = caption.style.visibility = this.hidden ? 'hidden' : ''
    }
    this.draw()
  }

  // Zoom and place

  get fitting() {
    return Math.min(this.stage.clientWidth / this.width, this.stage.clientHeight / this.height)
  }

  resize() {
    const width = this.viewer.clientWidth
    const full = document.fullscreenElement === this.viewer
    if (!width || (width === this.lastWidth && full === this.full)) return
    const centre = this.at(this.stage.clientWidth / 2, this.stage.clientHeight / 2)
    this.lastWidth = width
    this.full = full
    const space = full ? innerHeight - 150 : Math.min(innerHeight * 0.75, Math.max(this.height, 360), width * this.height / this.width)
    this.stage.style.height = `${Math.max(Math.round(space), 220)}px`
    if (this.fitted) return this.fit(this.fitted)
    this.zoom = Math.max(this.zoom, this.smallest)
    this.x = this.stage.clientWidth / 2 - centre.x * this.zoom
    this.y = this.stage.clientHeight / 2 - centre.y * this.zoom
    this.draw()
  }

  get smallest() {
    return Math.min(STEPS[0], this.fitting)
  }

  at(x, y) { // the place in the image that lies at a place of the stage
    return { x: (x - this.x) / this.zoom, y: (y - this.y) / this.zoom }
  }

  fit(most = LARGEST) {
    this.zoomTo(Math.min(this.fitting, most))
    this.x = (this.stage.clientWidth - this.width * this.zoom) / 2
    this.y = (this.stage.clientHeight - this.height * this.zoom) / 2
    this.fitted = most
    this.draw()
  }

  // x and y stay where they are.
  zoomTo(zoom, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    const fixed = this.at(x, y)
    this.fitted = 0
    this.zoom = between(this.smallest, zoom, LARGEST)
    this.x = x - fixed.x * this.zoom
    this.y = y - fixed.y * this.zoom
    this.draw()
  }

  step(direction) {
    const next = direction > 0 ? STEPS.find((step) => step > this.zoom * 1.001) : STEPS.findLast((step) => step < this.zoom / 1.001)
    this.zoomTo(next ?? (direction > 0 ? LARGEST : this.smallest))
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.stage
    const [across, down] = [this.width * this.zoom, this.height * this.zoom]
    this.x = across <= width ? (width - across) / 2 : between(width - across, this.x, 0)
    this.y = down <= height ? (height - down) / 2 : between(height - down, this.y, 0)
    for (const key of ['left', 'right']) {
      const { style } = this.images[this[key]].element
      style.width = `${across}px`
      style.height = `${down}px`
      style.transform = `translate(${Math.round(this.x)}px, ${Math.round(this.y)}px)`
    }
    this.stage.classList.toggle('larger', across > width + 1 || down > height + 1)
    this.stage.classList.toggle('crisp', this.zoom >= CRISP)
    this.stage.style.setProperty('--cut', `${this.cut * 100}%`)
    const share = Math.round(this.cut * 100)
    const [left, right] = this.hidden ? ['left', 'right'] : [this.left, this.right].map((index) => this.images[index].name)
    this.divider.setAttribute('aria-valuenow', share)
    this.divider.setAttribute('aria-valuetext', `${share} % ${left}, ${100 - share} % ${right}`)
    this.shown.textContent = `${Math.round(this.zoom * 100)} %`
  }

  moveDivider(cut) {
    this.cut = between(0, cut, 1)
    this.draw()
  }

  pan(x, y) {
    this.x += x
    this.y += y
    this.draw()
  }

  // Mouse, pen and fingers

  place(event) {
    const box = this.stage.getBoundingClientRect()
    return { x: event.clientX - box.left, y: event.clientY - box.top }
  }

  wheel(event) {
    if (!event.ctrlKey && event.timeStamp - scrolledAt < GESTURE) return // the page was being scrolled and goes on
    event.preventDefault()
    event.stopPropagation()
    const { x, y } = this.place(event)
    const turned = event.deltaY * [1, 16, 400][event.deltaMode]
    this.zoomTo(this.zoom * Math.exp(-between(-150, turned, 150) * (event.ctrlKey ? 0.01 : 0.002)), x, y)
  }

  press(event) {
    if (event.button) return
    this.stage.setPointerCapture(event.pointerId)
    this.touches.set(event.pointerId, this.place(event))
    if (this.touches.size > 1) return // two fingers zoom
    const larger = this.stage.classList.contains('larger')
    this.dragging = event.target === this.divider || !larger ? 'divider' : 'images'
    if (this.dragging === 'images') this.stage.classList.add('dragged')
    else if (event.target !== this.divider) this.moveDivider(this.place(event).x / this.stage.clientWidth)
  }

  drag(event) {
    const before = this.touches.get(event.pointerId)
    if (!before) return
    const now = this.place(event)
    this.touches.set(event.pointerId, now)
    if (this.touches.size > 1) {
      const other = [...this.touches].find(([id]) => id !== event.pointerId)[1]
      const distance = (point) => Math.hypot(point.x - other.x, point.y - other.y)
      this.zoomTo(this.zoom * distance(now) / Math.max(distance(before), 1), (now.x + other.x) / 2, (now.y + other.y) / 2)
    } else if (this.dragging === 'divider') this.moveDivider(now.x / this.stage.clientWidth)
    else this.pan(now.x - before.x, now.y - before.y)
  }

  release(event) {
    this.touches.delete(event.pointerId)
    this.stage.classList.remove('dragged')
  }

  // Keys

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches('select')) return
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key]
    const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)
    if (direction && event.target === this.divider) {
      this.moveDivider(this.cut + (direction[0] || -direction[1]) * (event.shiftKey ? 0.1 : 0.01))
    } else if (direction && event.target === this.stage) this.pan(-40 * direction[0], -40 * direction[1])
    else if (event.key === 'Home' && event.target === this.divider) this.moveDivider(0)
    else if (event.key === 'End' && event.target === this.divider) this.moveDivider(1)
    else if (event.key === '+' || event.key === '=') this.step(1)
    else if (event.key === '-') this.step(-1)
    else if (event.key === '0') this.zoomTo(1)
    else if (event.key === 'f' || event.key === 'F') this.fit()
    else if (event.key === 's' || event.key === 'S') this.swap()
    else if (digit && digit[1] <= this.images.length && !this.hidden) {
      this.choose({ [event.shiftKey ? 'left' : 'right']: digit[1] - 1 })
    } else return
    event.preventDefault()
  }
}

addEventListener('wheel', (event) => { scrolledAt = event.timeStamp }, { passive: true })
for (const figure of document.querySelectorAll('figure.comparison')) new Slider(figure)
